"""The advisor's rules, each on a graph that has what it looks for and on one that has not; times are a test's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
from onefold.advisor import RULES, Case, OnnxGraph, Variant, advise_on, select_rules
from onefold.advisor.activation_rules import find_activations
from onefold.advisor.trials import answer_in_batches, apply_all
from onefold.advisor.variant import open_engine, profile_layers
from onefold.errors import BadArgument, BadData
from onefold.runtimes.layer_times import LayerTime
from onnx_networks import Network, fake_bench

BY_NAME = {rule.name: rule for rule in RULES}


def case_of(variant: Variant, **facts: object) -> Case:
    layers = [LayerTime(name=node.name, kind=node.op_type, ns=1000.0) for node in variant.graph().nodes]
    return Case(**{"source": "net.onnx", "variant": variant, "layers": layers, "features": ("avx512",), **facts})


def remedies(name: str, variant: Variant, **facts: object):
    return list(BY_NAME[name].detect(case_of(variant, **facts)))


def changed(name: str, variant: Variant, **facts: object) -> Variant:
    (remedy,) = remedies(name, variant, **facts)
    after = remedy.apply(variant)
    assert after is not None
    return after


def answers(variant: Variant) -> np.ndarray:
    engine = open_engine(variant)
    try:
        return answer_in_batches(engine, variant, variant.images(4))
    finally:
        engine.close()


def kinds(variant: Variant) -> list[str]:
    return [node.op_type for node in variant.graph().nodes]


def assert_same_answers(before: Variant, after: Variant) -> None:
    ours, theirs = answers(before), answers(after)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()


def plain(wide: int = 16, **facts: object) -> Network:
    network = Network(**facts)
    network.head(network.op("Relu", network.conv("images", 3, wide)), wide)
    return network


# ------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("kind", ["norm", "scale", "shift", "minus", "quotient", "number"])
def test_what_follows_a_convolution_is_folded_into_it(kind: str):
    network = Network()
    x = network.conv("images", 3, 8)
    each = network.drawn(8, 1, 1)
    if kind == "norm":
        x = network.norm(x, 8)
    elif kind == "minus":
        x = network.op("Sub", each, x)
    elif kind == "quotient":
        x = network.op("Div", x, each)
    elif kind == "number":
        x = network.op("Mul", x, network.constant(np.array(0.25, dtype=np.float32)))
    else:
        x = network.op({"scale": "Mul", "shift": "Add"}[kind], x, each)
    network.head(network.op("Relu", x), 8)
    before = network.variant()
    after = changed("fold", before)
    assert kinds(after) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert_same_answers(before, after)


def test_what_is_no_part_of_a_convolution_stays():
    network = Network()
    x = network.conv("images", 3, 8)
    network.head(network.op("Add", network.norm(x, 8), network.op("Relu", x)), 8)  # the map is read twice
    assert not remedies("fold", network.variant())
    network = Network()
    x = network.op("Div", network.drawn(8, 1, 1), network.conv("images", 3, 8))  # a number over the map is not linear
    network.head(x, 8)
    assert not remedies("fold", network.variant())


@pytest.mark.parametrize("group", [1, 8])
def test_parallel_branches_become_one_convolution(group: int):
    network = Network()
    x = network.conv("images", 3, 8)
    branches = [
        network.norm(network.conv(x, 8, 8, group=group), 8),
        network.norm(network.conv(x, 8, 8, side=1, group=group), 8),
        network.norm(x, 8),
    ]
    x = network.op("Add", network.op("Add", branches[0], branches[1]), branches[2])
    network.head(network.op("Relu", network.op("Add", x, "v0")), 8)  # and a skip
    before = network.variant()
    after = changed("fold", before)
    assert kinds(after) == ["Conv", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert_same_answers(before, after)


def test_a_skip_over_an_activation_or_a_stride_is_no_branch():
    network = Network()
    x = network.conv("images", 3, 8)
    x = network.op("Add", network.op("Relu", network.conv(x, 8, 8)), x)
    network.head(x, 8)
    assert not remedies("fold", network.variant())


# ------------------------------------------------------------------------------------------ channels


def odd_network(**facts: object) -> Network:
    """Widths of 37 and 51, a depthwise layer, a skip, a gate, a norm and a scale."""
    network = Network(**facts)
    x = network.op("Relu", network.conv("images", 3, 37))
    y = network.op("HardSwish", network.norm(network.conv(x, 37, 37, group=37), 37))
    mean = network.op("GlobalAveragePool", y)
    gate = network.op("Sigmoid", network.conv(network.op("Relu", network.conv(mean, 37, 9, side=1)), 9, 37, side=1))
    x = network.op("Add", network.op("Mul", y, gate), x)
    x = network.op("Mul", x, network.drawn(37, 1, 1))
    network.head(network.op("Relu", network.conv(x, 37, 51, stride=2)), 51)
    return network


def test_odd_channels_are_padded_and_the_answers_stay():
    before = odd_network().variant()
    after = changed("channels", before)
    graph = after.graph()
    widths = {graph.constants[node.input[1]].shape[0] for node in graph.nodes if node.op_type == "Conv"}
    assert widths == {48, 16, 64}
    assert_same_answers(before, after)


def test_channels_that_fit_or_that_something_else_reads_stay():
    assert not remedies("channels", plain(16).variant())
    network = Network()
    x = network.conv("images", 3, 37)
    network.head(network.op("Softmax", x, axis=1), 37)  # a padded channel would take part in it
    assert not remedies("channels", network.variant())
    network = Network()
    x = network.op("Concat", network.conv("images", 3, 37), network.conv("images", 3, 11), axis=1)
    network.head(x, 48)
    assert not remedies("channels", network.variant())


def test_channels_reach_a_classifier_through_a_reshape():
    network = Network(batch=1)
    x = network.op("GlobalAveragePool", network.conv("images", 3, 37))
    x = network.op("Reshape", x, network.constant(np.array([1, 37])))
    network.op("MatMul", x, network.drawn(37, 5), name="logits")
    before = network.variant()
    assert_same_answers(before, changed("channels", before))


# --------------------------------------------------------------------------------------- activations


def activated(kind: str) -> Network:
    network = Network()
    x = network.conv("images", 3, 8)
    if kind == "SiLU":
        x = network.op("Mul", network.op("Sigmoid", x), x)
    elif kind == "GELU":
        x = network.op("Gelu", x)
    elif kind == "GELU by erf":
        root, one, half = (network.constant(np.array(v, dtype=np.float32)) for v in (2**0.5, 1.0, 0.5))
        grown = network.op("Add", network.op("Erf", network.op("Div", x, root)), one)
        x = network.op("Mul", network.op("Mul", x, grown), half)
    elif kind == "hard-swish":
        x = network.op("Mul", x, network.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    else:
        x = network.op("Sigmoid", x)
    network.head(x, 8)
    return network


@pytest.mark.parametrize("kind", ["SiLU", "GELU", "GELU by erf", "hard-swish", "sigmoid"])
def test_activations_are_known_however_they_are_written(kind: str):
    variant = activated(kind).variant()
    assert [each.kind for each in find_activations(variant.graph())] == [kind.split(" ")[0]]
    hard, relu = remedies("hard-activations", variant), remedies("relu", variant)
    assert bool(hard) == (kind != "hard-swish")
    assert bool(relu) == (kind != "sigmoid")
    if hard:
        after = hard[0].apply(variant)
        ours, theirs = answers(variant), answers(after)
        assert "Sigmoid" not in kinds(after)
        assert not {"Erf", "Gelu"} & set(kinds(after))
        assert 0 < np.abs(ours - theirs).max() < 0.2 * np.abs(ours).max()  # near, and not the same
    if relu:
        assert kinds(relu[0].apply(variant)) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]


def test_gates_are_left_out_and_other_products_are_not():
    after = changed("gates", odd_network().variant())
    assert kinds(after).count("Mul") == 1
    assert "Sigmoid" not in kinds(after)
    assert np.isfinite(answers(after)).all()
    assert not remedies("gates", activated("SiLU").variant())


# ------------------------------------------------------------------------------------ layouts and int8


def test_transposes_that_undo_each_other_go():
    network = Network()
    x = network.op("Transpose", network.conv("images", 3, 8), perm=[0, 2, 3, 1])
    x = network.op("Transpose", network.op("Relu", x), perm=[0, 3, 1, 2])
    network.head(x, 8)
    before = network.variant()
    after = changed("transposes", before)
    assert "Transpose" not in kinds(after)
    assert_same_answers(before, after)
    network = Network()
    x = network.op("Transpose", network.conv("images", 3, 12), perm=[0, 2, 3, 1])
    network.head(network.op("Transpose", x, perm=[0, 2, 1, 3]), 12)
    assert not remedies("transposes", network.variant())


def test_paddings_go_into_the_convolution():
    network = Network()
    x = network.op("Pad", "images", network.constant(np.array([0, 0, 0, 1, 0, 0, 2, 1])))
    network.head(network.conv(x, 3, 8), 8)
    before = network.variant()
    after = changed("pads", before)
    assert "Pad" not in kinds(after)
    assert_same_answers(before, after)
    network = Network()
    one = network.constant(np.array(1.0, dtype=np.float32))
    x = network.op("Pad", "images", network.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), one)
    network.head(network.conv(x, 3, 8), 8)
    assert not remedies("pads", network.variant())


def quantized(*, idle: bool) -> Network:
    """An int8 graph with a HardSwish in float in it, or a value that is quantized twice."""
    network = Network()

    def pair(x: str, scale: float) -> str:
        constants = network.constant(np.array(scale, np.float32)), network.constant(np.array(128, np.uint8))
        return network.op("DequantizeLinear", network.op("QuantizeLinear", x, *constants), *constants)

    x = pair(network.conv(pair("images", 0.03), 3, 8), 0.05)
    x = pair(x, 0.05) if idle else network.op("HardSwish", x)
    network.head(pair(network.conv(x, 8, 8), 0.05), 8)
    return network


def test_a_value_quantized_twice_is_quantized_once():
    before = quantized(idle=True).variant(precision="int8")
    after = changed("qdq-pairs", before)
    assert kinds(after).count("QuantizeLinear") == 3
    assert_same_answers(before, after)
    assert not remedies("qdq-pairs", quantized(idle=False).variant(precision="int8"))


def test_an_island_in_float_is_quantized_by_its_range():
    before = quantized(idle=False).variant(precision="int8")
    after = changed("fp32-islands", before)
    assert kinds(after).count("QuantizeLinear") == 4
    ours, theirs = answers(before), answers(after)
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()
    assert not remedies("fp32-islands", quantized(idle=True).variant(precision="int8"))


# ------------------------------------------------------------------------------------------- sessions


def test_free_dimensions_are_fixed():
    after = changed("static-shape", plain().variant())
    assert after.graph().input_shape() == (1, 3, 12, 12)
    assert not remedies("static-shape", after)
    assert not remedies("batch", after)


def test_threads_are_tried_up_and_down():
    variant = plain().variant(threads=2)
    tried = [each.apply(variant).threads for each in remedies("threads", variant, usable_cores=4)]
    assert tried == [1, 4]
    assert not remedies("threads", plain().variant(), usable_cores=1)


def test_low_precision_is_for_processors_and_runtimes_that_have_it():
    vino = plain().variant(runtime="openvino")
    assert not remedies("bf16", vino)
    assert not remedies("bf16", plain().variant(), features=("bf16",))
    (remedy,) = remedies("bf16", vino, features=("bf16",))
    assert remedy.apply(vino).precision == "bf16"


# ---------------------------------------------------------------------------------------------- trials


def test_only_what_a_trial_confirmed_is_a_finding_and_the_rest_is_counted():
    variant = odd_network().variant()

    def cost(each: Variant) -> int:
        padded = any(48 in (each.graph().shape(node.input[1]) or ()) for node in each.graph().nodes[:1])
        return 100_000 // each.threads // (2 if padded else 1)

    rules = select_rules(["channels", "threads", "gates", "batch"])
    advice = advise_on(case_of(variant, usable_cores=2), rules, fake_bench(cost))
    assert {each.remedy.rule.name for each in advice.findings} == {"channels", "threads", "batch"}
    ratios = {each.remedy.rule.name: each.timing.ratio.value for each in advice.findings}
    assert ratios["threads"] == pytest.approx(0.5, rel=0.01)
    assert ratios["batch"] == pytest.approx(1 / 8, rel=0.01)  # the same call for eight images
    assert [each.remedy.rule.name for each in advice.unconfirmed] == ["gates"]
    (together,) = advice.combinations
    assert set(together.rules) == {"channels", "threads", "batch"}
    assert not together.changes_answers
    assert together.timing.ratio.value == pytest.approx(1 / 32, rel=0.02)


def test_a_change_that_should_leave_the_answers_and_does_not_is_no_finding():
    variant = odd_network().variant()
    relu = replace(BY_NAME["relu"], changes_answers=False)
    wrong = replace(relu, detect=lambda case: [replace(each, rule=wrong) for each in relu.detect(case)])
    bench = fake_bench(lambda each: 1000 * len(each.graph().nodes))
    advice = advise_on(case_of(variant), [wrong], bench)
    assert not advice.findings
    assert "its answers differ by" in advice.unconfirmed[0].why_not()


def test_what_a_runtime_does_not_take_is_counted_and_no_error():
    variant = plain().variant()
    rule = replace(BY_NAME["runtime"])
    broken = replace(rule, detect=lambda case: rule.detect(replace(case, other_runtimes=["ncnn"])))
    advice = advise_on(case_of(variant), [broken], fake_bench(lambda each: 1000))
    assert "cannot be tried" in advice.unconfirmed[0].why_not()


def test_a_fold_that_helps_is_where_the_others_start_from():
    network = Network()
    network.head(network.op("Relu", network.norm(network.conv("images", 3, 37), 37)), 37)
    bench = fake_bench(lambda each: 50_000 * len(each.graph().nodes))
    advice = advise_on(case_of(network.variant()), select_rules(["channels", "fold"]), bench)
    assert "BatchNormalization" not in kinds(advice.case.variant)
    assert advice.findings[0].remedy.rule.name == "fold"
    assert advice.findings[0].timing.ratio.value == pytest.approx(5 / 6, rel=0.01)


def test_accuracy_is_told_where_photos_are_given():
    variant = activated("SiLU").variant()
    right = np.ones(100, dtype=bool)

    def score(each: Variant) -> np.ndarray:
        return right if each.content == variant.content else np.arange(100) >= 7

    bench = replace(fake_bench(lambda each: 20_000 * len(each.graph().nodes)), score=score)
    (found,) = advise_on(case_of(variant), select_rules(["hard-activations"]), bench).findings
    value, low, high = found.timing.answers.drop
    assert value == 7
    assert low < 7 < high
    assert found.timing.answers.photos == 100
    without = advise_on(case_of(variant), select_rules(["hard-activations"]), replace(bench, score=None))
    assert "not known" in without.findings[0].timing.answers.describe()


def test_what_has_no_remedy_is_said_where_it_takes_time():
    network = Network()
    scales = network.constant(np.array([1, 1, 2, 2], dtype=np.float32))
    network.head(network.op("Resize", network.conv("images", 3, 16), "", scales), 16)
    advice = advise_on(case_of(network.variant()), [], fake_bench(lambda each: 1000))
    (remark,) = advice.remarks
    assert remark.startswith("1 Resize: 0.001 ms, 20 % of the layers' time")
    assert not advise_on(case_of(plain().variant()), [], fake_bench(lambda each: 1000)).remarks


def test_openvino_runs_and_profiles_the_same_graph():
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    variant = odd_network().variant()
    there = replace(variant, runtime="openvino")
    ours, theirs = answers(variant), answers(there)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    case = case_of(there, layers=profile_layers(there, calls=2))
    convs = [node for node in case.graph.nodes if node.op_type == "Conv"]
    assert {node.output[0] for node in convs} & set(case.ns_by_node)
    fixed = changed("static-shape", there)
    assert np.abs(np.concatenate([answers(fixed)]) - ours).max() < 1e-4 * np.abs(ours).max()


def test_the_runtime_s_times_are_those_of_the_nodes():
    variant = odd_network().variant()
    case = case_of(variant, layers=profile_layers(variant, calls=2))
    assert len(case.ns_by_node) >= 8
    assert 0.5 < case.share_of(case.graph.nodes) <= 1


def test_all_rules_are_complete_and_found_by_name():
    assert len(BY_NAME) == len(RULES) >= 16
    assert all(rule.looks_for and rule.remedy and rule.source for rule in RULES)
    with pytest.raises(BadArgument, match="no rule 'unroll'"):
        select_rules(["unroll"])


def test_rules_apply_one_after_the_other():
    variant = odd_network().variant()
    chosen = [each for name in ("channels", "gates", "static-shape") for each in remedies(name, variant)]
    after, names = apply_all(variant, chosen)
    assert set(names) == {"channels", "gates", "static-shape"}
    assert np.isfinite(answers(after)).all()


@pytest.mark.parametrize("content", [b"", b"not a network", onnx.ModelProto().SerializeToString()])
def test_what_is_no_network_is_refused(content: bytes):
    with pytest.raises(BadData):
        OnnxGraph(content).input_shape()


def test_the_page_has_the_rules_as_they_are():
    page = (Path(__file__).parents[1] / "docs/advise.md").read_text(encoding="utf-8")
    for r in RULES:
        answer = "change" if r.changes_answers else "stay"
        assert f"| `{r.name}` | {r.looks_for} | {r.remedy} | {answer} | {r.source} |" in page
    assert page.count("\n| `") == len(RULES)
