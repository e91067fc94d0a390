// What the library gives torch when it is loaded: kernels of the operators that stepgraph.native declares, for the CPU.
#include "torch_abi.h"

namespace stepgraph {

void register_attention(TorchLibraryHandle library);
void register_experts(TorchLibraryHandle library);
void register_heads(TorchLibraryHandle library);
void register_linear(TorchLibraryHandle library);
void register_mla_attention(TorchLibraryHandle library);
void register_route(TorchLibraryHandle library);
void register_rows(TorchLibraryHandle library);

namespace {

const bool registered = [] {
  TorchLibraryHandle library;  // kept for the life of the process, as the registrations are
  check(aoti_torch_library_init_impl("stepgraph_native", "CPU", __FILE__, __LINE__, &library));
  register_attention(library);
  register_experts(library);
  register_heads(library);
  register_linear(library);
  register_mla_attention(library);
  register_route(library);
  register_rows(library);
  return true;
}();

}  // namespace
}  // namespace stepgraph
