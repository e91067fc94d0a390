"""What an application is built of, without a Ray that runs."""

from types import SimpleNamespace

import pytest
from ray import serve

from stepgraph.errors import ConfigError
from stepgraph.ray import app, build_openai_app
from stepgraph.ray.autoscaling import KV_TARGET, requests_and_cache
from stepgraph.ray.metrics import merged
from stepgraph.ray.prompts import prompt_of
from stepgraph.ray.router import ReplicaLoad
from stepgraph.ray.settings import from_command_line, read_plan
from stepgraph.server.routing import REQUEST_TOKENS, Router

CPU = {"model": "smollm2", "device": "cpu"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_num_seq": 8}, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is too small"),
        ({"port": 80}, "port is about the HTTP server of `stepgraph serve`"),
        ({"enable_admin_endpoints": True}, "deploy the application anew"),
        ({"data_parallel_size": 2}, "set num_replicas in deployment_config"),
        ({"deployment_config": {"num_replica": 2}}, "deployment_config: unknown setting 'num_replica'"),
        ({"deployment_config": 2}, "deployment_config must be a mapping, not int"),
        ({"deployment_config": {"num_replicas": 0}}, "deployment_config: num_replicas is expected to"),
        (
            {"deployment_config": {"num_replicas": "two"}},
            "^deployment_config: num_replicas: Input should be a valid integer",
        ),
        ({"deployment_config": {"ray_actor_options": {"num_cpus": "a"}}}, "deployment_config: .*'num_cpus'"),
        ({"deployment_config": {"ray_actor_options": 3}}, "ray_actor_options=3 must be a mapping"),
        (
            {"deployment_config": {"placement_group_bundles": [5]}},
            r"placement_group_bundles=\[5\] must be a list of mappings",
        ),
        ({"ingress_deployment_config": {"num_replicas": 0}}, "ingress_deployment_config: num_replicas is"),
        ({"llm_configs": []}, "must be a list of one"),
        ({"engine_kwargs": {"device": "cuda"}}, "device is 'cpu' and, in engine_kwargs, 'cuda'"),
        ({"accelerator_type": "H100"}, "the engine runs on none"),
        ({"deployment_config": {"ray_actor_options": {"num_gpus": 1}}}, "the engine runs on device=cpu; leave it out"),
        (
            {"tensor_parallel_size": 2, "deployment_config": {"placement_group_bundles": [{"CPU": 1}] * 2}},
            "has 2 bundles",
        ),
        (
            {"deployment_config": {"placement_group_strategy": "SPREAD"}},
            "the ranks of an engine share the memory of one machine",
        ),
        (
            {"device": "cuda", "tensor_parallel_size": 2, "deployment_config": {"ray_actor_options": {"num_gpus": 1}}},
            r"num_gpus=1, and a replica has 2 devices \(tensor_parallel_size=2\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_one_sentence(config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_openai_app({**CPU, **config})


def test_ranks_are_one_bundle_on_one_node() -> None:
    options = read_plan({"model": "smollm2", "device": "cuda", "tensor_parallel_size": 4}).engine_options
    assert options["placement_group_bundles"] == [{"CPU": 4, "GPU": 4}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 4}
    on_cpu = read_plan({**CPU, "tensor_parallel_size": 2}).engine_options
    assert on_cpu["placement_group_bundles"] == [{"CPU": 2}]


def test_a_pair_of_roles_is_one_replica_with_all_its_devices() -> None:
    pair = {"model": "smollm2", "device": "cuda", "prefill_devices": [0], "decode_devices": [1, 2], "max_num_seqs": 8}
    options = read_plan(pair).engine_options
    assert options["placement_group_bundles"] == [{"CPU": 3, "GPU": 3}]
    assert options["max_ongoing_requests"] == 2 * 8 + 512 + 64


def test_engines_on_one_device_need_no_group_and_may_share_it() -> None:
    options = {"ray_actor_options": {"num_gpus": 0.5, "num_cpus": 2}}
    found = read_plan({"model": "smollm2", "device": "cuda", "deployment_config": options, "accelerator_type": "L4"})
    assert "placement_group_bundles" not in found.engine_options
    assert found.engine_options["ray_actor_options"] == {"num_gpus": 0.5, "num_cpus": 2, "accelerator_type": "L4"}


def test_what_users_of_ray_write_is_understood() -> None:
    theirs = {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "small", "model_source": "smollm2"},
                "engine_kwargs": {"device": "cpu", "max_num_seqs": 8},
                "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}},
            }
        ],
        "ingress_deployment_config": {"num_replicas": 2},
    }
    plan = read_plan(theirs)
    assert (plan.engine.model.model, plan.server.served_model_name) == ("smollm2", ("small",))
    scaling = plan.engine_options["autoscaling_config"]
    assert (scaling["max_replicas"], scaling["target_ongoing_requests"]) == (3, 6.4)
    assert plan.ingress_options["num_replicas"] == 2


def test_text_of_a_command_line_gets_the_types_of_the_settings() -> None:
    given = {"model": "smollm2", "device": "cpu", "max_num_seqs": "8", "served_model_name": "7", "lora_modules": "a=b"}
    assert from_command_line({**given, "enable_lora": "true", "deployment_config": '{"num_replicas": 2}'}) == {
        **given,
        "max_num_seqs": 8,
        "enable_lora": True,
        "deployment_config": {"num_replicas": 2},
    }
    with pytest.raises(ConfigError, match="unknown setting 'modle'; did you mean 'model'"):
        app({"modle": "smollm2"})
    assert isinstance(app({**given, "lora_modules": "a=b", "enable_lora": "true"}), serve.Application)


def context(num_requests, stats):
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 10)
    return SimpleNamespace(total_num_requests=num_requests, config=config, aggregated_metrics=stats)


def test_replicas_follow_requests_or_the_cache_whichever_needs_more() -> None:
    assert requests_and_cache(context(25, None)) == (2.5, {})
    full = {
        "num_running": {"a": 4, "b": 4},
        "num_waiting": {"a": 4, "b": 0},
        "kv_usage": {"a": KV_TARGET, "b": KV_TARGET / 2},
    }
    assert requests_and_cache(context(12, full))[0] == pytest.approx(2.5)


def test_prompts_that_share_a_beginning_share_what_a_router_sees_of_it() -> None:
    first = b'{"messages": [{"role": "user", "content": "hello, how are you"}], "model": "m"}'
    second = b'{"model": "m", "messages": [{"role": "user", "content": "hello, how are you"}, {"role": "assistant"}]}'
    one, two = prompt_of(first).token_ids, prompt_of(second).token_ids
    assert len(one) > 10
    assert two[: len(one) - 1] == one[:-1]
    assert prompt_of(b'{"prompt": [[3, 4], [5]], "cache_salt": "s", "prompt_cache_key": "k"}').token_ids == [3, 4]
    assert prompt_of(b'{"prompt": ["abcdefgh", "x"]}').token_ids == prompt_of(b'{"prompt": "abcdefgh"}').token_ids
    for body in (b"", b"[]", b"{", b"\xff", b'{"prompt": [null]}', b'{"prompt": {}}', b'{"model": [1]}'):
        assert prompt_of(body).token_ids == []


def test_a_router_takes_replicas_that_come_later() -> None:
    router = Router(0, block_size=64, num_kv_blocks=64, max_adapters=1)
    assert [router.add(), router.add()] == [0, 1]
    prompt = list(range(640))
    first = router.route(prompt, [0, 0]).replica
    assert router.route(prompt, [0, 0]) == (first, 640)
    router.forget(first)
    assert router.route(prompt, [0, 0]).num_cached_tokens == 0


def test_a_report_adds_what_others_sent_and_a_routers_own_requests_count_once() -> None:
    load = ReplicaLoad()
    load.sent("a", 100)
    load.sent("b", 50)
    assert load.tokens == 2 * REQUEST_TOKENS + 150
    report = {"is_up": True, "num_by_sender": {"mine": 2, "other": 3}, "time": 1.0}
    load.hear(report, "mine")
    load.hear(report, "mine")  # again, which is no news
    assert load.tokens == 5 * REQUEST_TOKENS + 150
    load.hear({**report, "num_by_sender": {"mine": 2}, "time": 2.0}, "mine")
    assert load.tokens == 2 * REQUEST_TOKENS  # the prompts are taken to be computed
    load.ended("a")
    load.ended("b")
    load.ended("b")
    assert load.tokens == 0


def test_metrics_of_replicas_are_one_text_with_a_label() -> None:
    texts = {
        "a": '# HELP x What.\n# TYPE x gauge\nx{engine="0"} 1.0\n# HELP y Else.\n# TYPE y counter\ny_total 2.0\n# EOF\n',
        "b": '# HELP x What.\n# TYPE x gauge\nx{engine="0"} 3.0\n# HELP y Else.\n# TYPE y counter\ny_total 4.0\n# EOF\n',
    }
    assert merged(texts) == (
        '# HELP x What.\n# TYPE x gauge\nx{replica="a",engine="0"} 1.0\nx{replica="b",engine="0"} 3.0\n'
        '# HELP y Else.\n# TYPE y counter\ny_total{replica="a"} 2.0\ny_total{replica="b"} 4.0\n# EOF\n'
    )
    name = 'a} "b"\u2028\x85\r'.replace('"', r"\"")
    heading = "# HELP x What.\n# TYPE x gauge\n"
    assert merged({"a": f'{heading}x{{model="{name}"}} 1.0\n'}) == f'{heading}x{{replica="a",model="{name}"}} 1.0\n'
