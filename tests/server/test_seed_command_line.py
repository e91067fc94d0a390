"""The command line for FastDeploy that this project began with, with the embedded model: what it starts, and what it says."""

from live import free_ports, running_server

GRAPHS = ' {"use_cudagraph":true, "cudagraph_only_prefill":true}'
"""With the space that stands before it there."""


def test_the_command_line_starts_a_server_that_prefills_in_graphs_and_says_that_it_decodes_without(smollm2) -> None:
    """At 8192, which is what this model has; `fastdeploy` in test_openai_client.py is at the 32768 of the original."""
    port, queue_port, metrics_port = free_ports(3)
    flags = (
        f"--max-num-seqs 64 --max-model-len 8192 --port {port} --engine-worker-queue-port {queue_port} "
        f"--metrics-port {metrics_port} --tensor-parallel-size 1 --graph-optimization-config"
    )
    with running_server("smollm2", [*flags.split(), GRAPHS]) as server, server.client() as client:
        [served] = client.models.list()
        assert served.model_dump()["max_model_len"] == 8192
        reply = client.completions.create(
            model=served.id, prompt="One, two, three, four, ", temperature=0, max_tokens=4
        )
        assert reply.usage.completion_tokens == 4
        server.wait_idle()
        graphs = server.get("/graphs").json
        assert (graphs["eager_steps"], graphs["eager_reasons"]) == (3, {"not_pure_prefill": 3})
        assert server.metric("steps_total", kind="prefill", mode="graph") == 1
        assert server.metric("steps_total", kind="prefill", mode="eager") == 0
        assert server.metric("steps_total", kind="decode", mode="eager", reason="not_pure_prefill") == 3
        said = "".join(server.output)
        assert "tensor_parallel_size" not in said
        assert "steps without a graph: those that decode (cudagraph_only_prefill)" in said
        assert "WARNING stepgraph.step.graphs: steps that run without a graph" in said
