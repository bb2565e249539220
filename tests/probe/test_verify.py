"""Verification without torch: what is a probe set is accepted, and whatever else anybody makes up is refused by name, in bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from sedac.errors import ArtifactError
from sedac.policy.layout import Layout, find_certified_digest, find_fit_problem
from sedac.probe.manifest import MAX_MANIFEST_BYTES, parse_manifest
from sedac.probe.verify import verify, verify_weights

from testing.probe_sets import HIDDEN, LAYERS, NEURONS, MadeSet, make_fields, make_set, make_tensors, pack, pack_raw

GOOD = make_set()
NAN, INF = float("nan"), float("inf")


def check(made: MadeSet, directory):
    made.write(directory)
    return verify(made.manifest, directory / "probes.safetensors")


def check_in_memory(made: MadeSet) -> str:
    return verify_weights(parse_manifest(made.manifest, "m"), io.BytesIO(made.weights), "w")


def header_of(made: MadeSet) -> bytes:
    return made.weights[8 : 8 + int.from_bytes(made.weights[:8], "little")]


def with_header(change) -> MadeSet:
    """The good set with its parsed header changed."""
    header = header_of(GOOD)
    return GOOD.with_weights(pack_raw(json.dumps(change(json.loads(header))).encode(), GOOD.weights[8 + len(header) :]))


def test_a_good_set_is_accepted_and_told_of(tmp_path):
    found = check(GOOD, tmp_path)
    assert found.size_bytes == len(GOOD.weights)
    summary = found.summary
    assert (summary.name, summary.sha256, summary.rank, summary.checkpoint_layers) == ("fresh", GOOD.sha256, 4, (2, 5, 8))
    assert len(summary.levels_sha256) == 64


def test_the_engine_loads_what_is_verified_with_the_same_digest_of_levels(tmp_path):
    from sedac.probe import artifact  # torch

    found = check(GOOD, tmp_path)
    loaded = artifact.load(tmp_path)
    assert loaded.levels_sha256 == found.levels_sha256
    assert sorted(loaded.probes) == [2, 5, 8]
    assert loaded.probes[5].down.weight.numpy().tobytes() == make_tensors()["5.down.weight"][2]
    assert loaded.neurons[3].repair_FD.shape == (NEURONS, HIDDEN)


def test_the_digest_of_levels_depends_on_all_that_levels_are_and_on_nothing_else(tmp_path):
    base = check(GOOD, tmp_path / "base").levels_sha256
    assert check(make_set("other", (2, 5), rank=2, seed=9), tmp_path / "probes").levels_sha256 == base
    assert check(make_set(levels=False), tmp_path / "none").levels_sha256 == ""
    order = make_tensors()["neurons.4.order"]
    seen = {base}
    for i, changes in enumerate(
        (
            {"neurons.4.order": (*order[:2], order[2][4:] + order[2][:4])},
            {"neurons.4.scale": ("F32", (NEURONS,), np.full(NEURONS, 0.5, "<f4").tobytes())},
            {"neurons.1.repair": None},
            {"neurons.2.repair": ("BF16", (NEURONS, HIDDEN), bytes(2 * NEURONS * HIDDEN))},
            {"levels.width-20.neurons": ("I32", (LAYERS,), np.zeros(LAYERS, "<i4").tobytes())},
        )
    ):
        seen.add(check(make_set(changes=changes), tmp_path / str(i)).levels_sha256)
    seen.add(check(GOOD.with_fields(score="activation"), tmp_path / "score").levels_sha256)
    seen.add(check(GOOD.with_fields(activation="gelu"), tmp_path / "activation").levels_sha256)
    assert len(seen) == 8, "every change gives another digest"


def test_every_flipped_byte_of_the_header_is_refused_by_the_digest():
    end = 8 + len(header_of(GOOD))
    for position in range(end):
        bad = bytearray(GOOD.weights)
        bad[position] ^= 1 << position % 8
        with pytest.raises(ArtifactError, match=r"sha256 .* the manifest says .*copy the probe set again"):
            check_in_memory(MadeSet(GOOD.manifest, bytes(bad)))


def test_every_flipped_byte_of_the_header_with_its_digest_made_good_is_refused():
    """One bit of every byte, all of every eighth: no header but the promised one describes these tensors. Of the set that leaves nothing open."""
    dtype, shape = "BF16", (NEURONS, HIDDEN)
    made = make_set(changes={f"neurons.{layer}.repair": (dtype, shape, bytes(2 * NEURONS * HIDDEN)) for layer in range(LAYERS)})
    end, accepted = 8 + len(header_of(made)), []
    for position in range(end):
        for bit in range(8) if position % 8 == 0 else (position % 7,):
            bad = bytearray(made.weights)
            bad[position] ^= 1 << bit
            with contextlib.suppress(ArtifactError):
                check_in_memory(made.with_weights(bytes(bad)))
                accepted.append((made.weights[position : position + 1], bytes(bad[position : position + 1])))
    assert all(old == b" " and new.isspace() for old, new in accepted), "one white space of JSON may stand for another, all else has one meaning"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -4000])
def test_truncated_files_are_refused(tmp_path, length):
    cut = GOOD.weights[:length]
    with pytest.raises(ArtifactError, match="copy the probe set again"):
        check(MadeSet(GOOD.manifest, cut), tmp_path)
    with pytest.raises(ArtifactError, match=r"header|bytes, its tensors end at"):
        check(GOOD.with_weights(cut), tmp_path)


def test_bytes_after_the_tensors_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="its tensors end at"):
        check(GOOD.with_weights(GOOD.weights + b"\0"), tmp_path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/sedac-pickle-ran",)


@pytest.mark.parametrize("weights", [pickle.dumps(Bomb()), b"\x80\x02" + bytes(500), b"PK\x03\x04" + bytes(500), b"{" * 600])
def test_pickles_and_other_formats_are_refused_unread(tmp_path, weights):
    with pytest.raises(ArtifactError, match="its header has"):
        check(GOOD.with_weights(weights), tmp_path)
    assert not os.path.exists("/tmp/sedac-pickle-ran")


def set_entry(name, **fields):
    return lambda header: header | {name: header[name] | fields}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h | {"9.down.weight": h["2.down.weight"]}, "'9.down.weight' is not promised"),
        (lambda h: h | {"2.d\u043ewn.weight": h["2.out.bias"]}, r"u043ewn.weight' is not promised"),
        (lambda h: {k: v for k, v in h.items() if k != "5.out.bias"}, r"5.out.bias is no tensor, expected float32 \(1,\)"),
        (lambda h: {k: v for k, v in h.items() if k != "__metadata__"}, "its metadata is None"),
        (lambda h: h | {"__metadata__": {"format": "sedac-probe-set/1", "more": "x"}}, "its metadata is"),
        (lambda h: h | {"__metadata__": {"format": "pt"}}, "its metadata is"),
        (lambda h: [h], "its header is not that of safetensors|its metadata is"),
        (set_entry("2.out.bias", dtype="F64"), r"is float64 \(1,\), expected float32"),
        (set_entry("2.out.bias", dtype=["F32"]), "expected float32"),
        (set_entry("2.out.bias", shape=[1.0]), r"is \[1.0\], expected"),
        (set_entry("2.out.bias", shape=[True]), r"is \[True\], expected"),
        (set_entry("2.out.bias", shape=[-1]), "expected"),
        (set_entry("2.out.bias", shape=1), "expected"),
        (set_entry("2.out.bias", shape=[10**30]), "expected"),
        (set_entry("2.out.bias", data_offsets=[0, 0]), "expected 4 bytes"),
        (set_entry("2.out.bias", data_offsets=[4, 0]), "expected 4 bytes"),
        (set_entry("2.out.bias", data_offsets=[0, 4]), "the one before it ends at"),
        (set_entry("2.out.bias", data_offsets=[10**30, 10**30 + 4]), "expected 4 bytes"),
        (set_entry("2.out.bias", data_offsets="ab"), "expected 4 bytes"),
        (set_entry("2.out.bias", surprise=1), "expected float32"),
        (lambda h: h | {"2.out.bias": None}, "is no tensor"),
        (lambda h: h | {"2.out.bias": []}, r"is \[\], expected"),
    ],
)
def test_headers_that_say_something_else_are_refused(tmp_path, change, reason):
    with pytest.raises(ArtifactError, match=reason):
        check(with_header(change), tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"{" * 4000,
        b"[" * 4000,
        b'{"a":' * 900,
        b'{"__metadata__": {"format": "sedac-probe-set/1", "format": "sedac-probe-set/1"}}',
        b"\xff\xfe" * 20,
        b"null",
        b"1" * 4000,
        b'{"x": NaN}',
        b'{"\\u0000": 1}',
    ],
)
def test_headers_that_are_none_are_refused(tmp_path, header):
    with pytest.raises(ArtifactError, match=r"probes\.safetensors: its "):
        check(GOOD.with_weights(pack_raw(header, GOOD.weights[8 + len(header_of(GOOD)) :])), tmp_path)


def test_a_header_longer_than_any_promised_is_not_even_read(tmp_path):
    made = GOOD.with_weights((1 << 40).to_bytes(8, "little") + GOOD.weights[8:])
    with pytest.raises(ArtifactError, match=r"its header has 1099511627776 bytes by its own account, at most \d+ can be"):
        check(made, tmp_path)


def floats(*values, shape=None):
    array = np.array(values, "<f4")
    return "F32", shape or array.shape, array.tobytes()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part", ["down.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"])
def test_weights_that_are_not_finite_are_refused(tmp_path, part, bad):
    dtype, shape, data = make_tensors()[f"8.{part}"]
    array = np.frombuffer(data, "<f4").copy()
    array[-1] = bad
    with pytest.raises(ArtifactError, match=f"8.{part} holds NaN or infinity; train the probe again"):
        check(make_set(changes={f"8.{part}": (dtype, shape, array.tobytes())}), tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("levels.contextual-30.threshold", floats(*[NAN] * LAYERS), "below 0 or NaN"),
        ("levels.contextual-30.threshold", floats(*[-0.1] * LAYERS), "below 0 or NaN"),
        ("levels.width-20.neurons", ("I32", (LAYERS,), np.full(LAYERS, NEURONS + 1, "<i4").tobytes()), r"outside 0\.\.6"),
        ("levels.width-20.neurons", ("I32", (LAYERS,), np.full(LAYERS, -1, "<i4").tobytes()), r"outside 0\.\.6"),
        ("neurons.11.order", ("I32", (NEURONS,), np.zeros(NEURONS, "<i4").tobytes()), "no permutation"),
        ("neurons.11.order", ("I32", (NEURONS,), np.array([0, 1, 2, 3, 4, 2**31 - 1], "<i4").tobytes()), "no permutation"),
        ("neurons.11.order", ("I32", (NEURONS,), np.array([0, 1, 2, 3, 4, -1], "<i4").tobytes()), "no permutation"),
        ("neurons.11.scale", floats(*[INF] * NEURONS), "NaN, infinity or a negative"),
        ("neurons.11.scale", floats(*[-1] * NEURONS), "NaN, infinity or a negative"),
        ("neurons.11.repair", ("BF16", (NEURONS, HIDDEN), b"\x80\x7f" * (NEURONS * HIDDEN)), "NaN or infinity"),
        ("neurons.11.repair", ("BF16", (NEURONS, HIDDEN), b"\xc0\xff" * (NEURONS * HIDDEN)), "NaN or infinity"),
    ],
)
def test_levels_with_values_out_of_range_are_refused(tmp_path, name, tensor, reason):
    with pytest.raises(ArtifactError, match=f"{name} .*{reason}.*calibrate the set again"):
        check(make_set(changes={name: tensor}), tmp_path)


def test_an_infinite_level_threshold_means_none_and_is_accepted(tmp_path):
    check(make_set(changes={"levels.contextual-30.threshold": floats(*[INF] * LAYERS)}), tmp_path)


def test_tensors_in_another_order_are_the_same_set(tmp_path):
    tensors = make_tensors()
    check(GOOD.with_weights(pack(dict(reversed(tensors.items())))), tmp_path)


def test_links_pipes_and_directories_are_refused(tmp_path):
    GOOD.write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "probes.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for path in ("link", "pipe", "real", "missing"):
        with pytest.raises(ArtifactError, match="copy the probe set again"):
            verify(GOOD.manifest, tmp_path / path)


def parse(**fields):
    return parse_manifest(json.dumps(GOOD.fields | fields).encode(), "m")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "A", " a", "a ", "-a", "a" * 65, "d\u0435mo", "\uff44emo",
     "demo\u200b", "dem\u0301o",
     "\ud800", "\u202edemo", 5, None, ["a"], {"a": 1}, True],
)  # fmt: skip
def test_hostile_names_are_refused(name):
    with pytest.raises(ArtifactError, match=r"field name is out of range|control character"):
        parse(name=name)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hidden_size", [0, -1, 2**40, 1.5, "8", True, None, NAN, 10**400]),
        ("num_layers", [0, 10**6, 4097, 12.0]),
        ("rank", [0, 4097, [1]]),
        ("format", ["", "sedac-probe-set/2", 1]),
        ("sha256", ["", "x" * 64, "A" * 64, "a" * 63, None, 5]),
        ("model", [5, "x" * 2000, None]),
        ("target", [[], "x" * 2000]),
        ("training", [[], 5, None]),
        ("intermediate_size", [0, -1, 1 << 30, True]),
        ("activation", ["relu", 5, []]),
        ("score", ["up", {}]),
        ("probes", [[], [{"layer": 5, "threshold": 1}, {"layer": 2, "threshold": 1}], [{"layer": 2, "threshold": 1}] * 2]),
        ("probes.layer", [[{"layer": n, "threshold": 1}] for n in (-1, LAYERS, 1.0, True, "2", NAN, 10**400)]),
        ("probes.threshold", [[{"layer": 2, "threshold": n}] for n in (NAN, INF, -INF, -1, "1", None, True, 10**400)]),
        ("probes.metrics", [[{"layer": 2, "threshold": 1, "metrics": m}] for m in ([], {"a": "b"}, {"a": {}}, 5)]),
        ("levels.saved", [[{"name": "l", "reduction": "width", "saved": n, "perplexity_ratio": 1}] for n in (NAN, 2, -1, None)]),
        ("levels.name", [[{"name": n, "reduction": "width", "saved": 0.1, "perplexity_ratio": 1}] for n in ("../x", "skip", 5, "\u0430")]),
        ("levels", [[{"name": f"l{i}", "reduction": "width", "saved": 0.1, "perplexity_ratio": 1} for i in range(15)]]),
        ("tiers.name", [[{"name": n, "floor": "full", "level": "skip"}] for n in ("", "a/b", 5)]),
        ("tiers.threshold_scale", [[{"name": "a", "floor": "full", "level": "skip", "threshold_scale": n}] for n in (NAN, INF, -1)]),
    ],
)
def test_fields_out_of_range_are_refused_with_value_and_limit(field, values):
    for value in values:
        changes = {field.partition(".")[0]: value} | ({} if field.startswith("tiers") else {"tiers": []})
        with pytest.raises(
            ArtifactError, match=rf"m: field {field} is out of range: .*; .*; |m: field {field} is out of range: .*; .*, write it with"
        ):
            parse(**changes)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"5", b'"x"', b"{", b"\xff\xfe{}", b"\x80", b"{}", b'{"probes": 5}', b'{"probes": [5]}', b'{"probes": {"a": 1}}',
        b'{"name": "a", "name": "a"}', b"[" * 100_000, b'{"a":' * 80_000, b"9" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1),
        pickle.dumps({"name": "x"}),
    ],
)  # fmt: skip
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(ArtifactError, match=r"^m (is not a probe set's manifest|has over)"):
        parse_manifest(data, "m")


def test_unknown_missing_and_deep_fields_are_refused():
    for fields in (GOOD.fields | {"surprise": 1}, {k: v for k, v in GOOD.fields.items() if k != "rank"}):
        with pytest.raises(ArtifactError, match="is not a probe set's manifest"):
            parse_manifest(json.dumps(fields).encode(), "m")
    deep: object = 1
    for _ in range(60):
        deep = {"x": [deep]}
    with pytest.raises(ArtifactError, match="nested deeper than 32"):
        parse(training=deep)
    with pytest.raises(ArtifactError, match="control character"):
        parse(model="a\x1b[2Jb")
    with pytest.raises(ArtifactError, match="control character"):
        parse(training={"\ud800": 1})
    assert parse(model="modèle 模型").model == "modèle 模型", "names for people may be in any language"


def test_a_million_layers_are_refused_at_once():
    many = json.dumps(
        make_fields() | {"sha256": "0" * 64, "num_layers": 10**6, "probes": [{"layer": n, "threshold": 1} for n in range(10**6)]}
    ).encode()
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=f"has over {MAX_MANIFEST_BYTES} bytes"):
        parse_manifest(many, "m")
    few = json.dumps(make_fields() | {"sha256": "0" * 64, "num_layers": 4096, "probes": [{"layer": n, "threshold": 1} for n in range(5000)]}).encode()
    with pytest.raises(ArtifactError, match=r"field probes.layer is out of range: 4096"):
        parse_manifest(few, "m")
    print(f"refused in {time.monotonic() - started:.3f} s")


_MEMORY_JOB = """
import re, sys
from pathlib import Path
from sedac.probe.verify import verify
def get_peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
directory, before = Path(sys.argv[1]), get_peak()
print(verify((directory / "manifest.json").read_bytes(), directory / "probes.safetensors").size_bytes)
print(get_peak() - before)
print("torch" in sys.modules)
"""


def test_a_large_set_is_verified_in_little_memory_and_without_torch(tmp_path):
    """160 MB of weights; the figure is the growth of the largest resident size."""
    hidden, rank = 16384, 2560
    shapes = {"down.weight": (rank, hidden), "norm.weight": (rank,), "norm.bias": (rank,), "out.weight": (1, rank), "out.bias": (1,)}
    tensors = {f"2.{name}": ("F32", shape, bytes(4 * int(np.prod(shape)))) for name, shape in shapes.items()}
    made = make_set(layers=(2,), levels=False).with_fields(hidden_size=hidden, rank=rank).with_weights(pack(tensors))
    made.write(tmp_path)
    done = subprocess.run([sys.executable, "-c", _MEMORY_JOB, str(tmp_path)], capture_output=True, text=True, check=True)
    size, growth, has_torch = done.stdout.split()
    print(f"{int(size) >> 20} MiB verified, resident size grew by {int(growth) >> 10} MiB")
    assert int(growth) << 10 < int(size) // 2
    assert has_torch == "False"


LAYOUT = Layout(num_layers=LAYERS, hidden_size=HIDDEN, checkpoint_layers=(2, 5, 8), probe_set="demo", probe_set_sha256="2" * 64, max_rank=4)


@pytest.mark.parametrize(
    ("made", "layout", "problem"),
    [
        (make_set(levels=False), {}, ""),
        (make_set(levels=False, layers=(2,)), {}, ""),
        (make_set(levels=False, rank=2), {}, ""),
        (make_set(levels=False), {"hidden_size": 16}, "made for hidden_size 8, the model has 16; train"),
        (make_set(levels=False), {"num_layers": 24}, "made for num_layers 12, the model has 24; train"),
        (make_set(levels=False, layers=(2, 3)), {}, "a probe for layer 3, attached are 2, 5, 8; restart"),
        (make_set(levels=False, rank=5), {}, "its rank 5 is over 4"),
        (make_set(levels=False), {"max_rank": 0}, "its rank 4 is over 0"),
        (make_set(), {}, "are not those attached .none.; restart"),
        (make_set(), {"levels_sha256": "5" * 64}, r"are not those attached .555555555555\.\.\..; restart"),
        (make_set(levels=False), {"levels_sha256": "5" * 64}, ""),
        (make_set("demo", levels=False), {}, "started with another set of that name"),
    ],
)
def test_what_would_need_a_restart_is_told_with_its_remedy(tmp_path, made, layout, problem):
    found = find_fit_problem(check(made, tmp_path).summary, replace(LAYOUT, **layout))
    assert re.search(problem, found) if problem else found == ""


def test_levels_that_are_those_attached_fit_and_can_be_certified(tmp_path):
    own = check(GOOD, tmp_path / "a").summary
    layout = replace(LAYOUT, levels_sha256=own.levels_sha256)
    assert find_fit_problem(own, layout) == ""
    assert find_certified_digest(own, layout) == GOOD.sha256
    bare = check(make_set(levels=False), tmp_path / "b").summary
    assert find_certified_digest(bare, layout) == "", "probes beside other levels have no digest of their own"
    assert find_certified_digest(bare, LAYOUT) == bare.sha256
    same = replace(own, name="demo", sha256="2" * 64)
    assert find_fit_problem(same, LAYOUT) == "", "what the engine started with needs no loading"
