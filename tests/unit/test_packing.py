"""A packed checkpoint computes what its codes and scales say, within any budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs

import understudy
from understudy import anatomy, assembly, formats, packing
from understudy.checkpoint import Checkpoint, packed
from understudy.core import STORED, ExpertId

# An ordinary one, and one that is transposed, interleaved and has biases.
FAMILIES = ("mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(family, format)``: (source, packed folder), each made once."""
    done: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family: str, format: str) -> tuple[Path, Path]:
        if (family, format) not in done:
            root = tmp_path_factory.mktemp(f"{family}-{format}")
            configs.build(family, root / "source")
            outcome = packing.pack(root / "source", format)
            done[family, format] = root / "source", outcome.path
        return done[family, format]

    return make


def logits(model: Any, tokens: int = 7) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(5, 120, (1, tokens))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def rounded(model: Any, format: str) -> Any:
    """transformers' own model with every expert matrix packed and unpacked."""
    chosen = formats.get(format)
    for module, real in configs.experts_of(model):
        for name, shape in module.params.items():
            if len(shape) < 3:
                continue
            for matrix in getattr(real, name).data:
                turned = matrix.T if module.transposed else matrix
                p = chosen.pack(turned)
                turned.copy_(chosen.unpack(p[""], p["_scales"], torch.float32))
    return model


def test_packing_a_model_does_not_change_whether_its_layers_are_compiled(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = made("mixtral", "int4")
    experts = anatomy.expert_parameters(anatomy.Anatomy.of(source))
    for threshold, frame in ((experts, "layers compiled"), (experts + 1, "eager")):
        monkeypatch.setattr(assembly, "COMPILE_PARAMETERS", threshold)
        for path in (source, folder):
            with understudy.load(path, memory="1GiB") as model:
                assert frame in model.understudy.policies["frame"]


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_with_the_rounded_weights(made: Any, family: str, format: str) -> None:
    source, folder = made(family, format)
    expected = logits(rounded(configs.load(family, source), format))
    assert folder.name == f"source-{format}"
    found = []
    for slots in (2, 5, 1000):
        with understudy.load(folder, memory="1GiB", slots=slots, dtype="float32") as model:
            found.append(logits(model))
            assert model.understudy.policies["format"] == format
            assert model.understudy.policies["lossy"] is True
            assert f"experts in {format}: LOSSY, unmeasured" in model.understudy.plan.line()
    assert torch.allclose(found[0], expected, atol=1e-5 * float(expected.abs().max()))
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_inspect_says_what_it_is(made: Any) -> None:
    source, folder = made("mixtral", "int4")
    before, after = understudy.inspect(source), understudy.inspect(folder)
    assert (before.format, before.lossy) == (STORED, False)
    assert (after.format, after.lossy) == ("int4", True)
    assert after.dense_bytes == before.dense_bytes
    assert after.experts == before.experts


def test_records_are_whole_pages_in_the_order_of_the_forward_pass(made: Any) -> None:
    _, folder = made("mixtral", "int8")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.manifest is not None
    names = [packed.record_name(expert) for expert, _ in checkpoint.manifest.records()]
    offsets = [checkpoint.tensors[name].offset for name in names]
    assert offsets == sorted(offsets)
    assert not any(offset % packed.PAGE for offset in offsets)
    assert names[:2] == ["experts.0.0", "experts.0.1"]
    parts = checkpoint.manifest.layers[0].parts
    assert [p.name for p in parts][:2] == ["gate_up_proj", "gate_up_proj_scales"]
    assert not any(part.start % packed.ALIGNMENT for part in parts)


def test_the_dense_part_is_as_it_was(made: Any) -> None:
    source, folder = made("mixtral", "int8")
    before, after = Checkpoint.open(source), Checkpoint.open(folder)

    def data(checkpoint: Checkpoint, name: str) -> bytes:
        info = checkpoint.tensors[name]
        return checkpoint.files[info.file].read_bytes()[info.offset :][: info.nbytes]

    dense = [name for name, info in after.tensors.items() if info.file == 0]
    assert set(dense) == {name for name in before.tensors if ".experts." not in name}
    assert all(data(before, name) == data(after, name) for name in dense)


def test_checksums_are_of_the_records(made: Any) -> None:
    import zlib

    _, folder = made("gpt_oss", "int4")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.manifest is not None
    info = checkpoint.tensors[packed.record_name(ExpertId(1, 2))]
    data = checkpoint.files[1].read_bytes()[info.offset :][: info.nbytes]
    assert checkpoint.manifest.checksums[1][2] == zlib.crc32(data)
    assert packing.verify(folder) == sum(map(len, checkpoint.manifest.checksums))


def test_what_it_costs_is_measured_and_kept(speaking_model: Path, tmp_path: Path) -> None:
    outcome = packing.pack(
        speaking_model, "int8", tmp_path / "packed", text="What it costs. " * 20, memory="1GiB"
    )
    assert outcome.quality is not None
    assert outcome.quality.tokens == 299
    assert outcome.expert_bytes < outcome.expert_bytes_before / 3
    assert abs(outcome.quality.delta_nll) < 0.1
    assert outcome.quality.delta_low <= outcome.quality.delta_nll <= outcome.quality.delta_high
    assert outcome.quality.kl > 0
    kept = json.loads((outcome.path / "understudy.json").read_text())["quality"]
    assert kept["delta_nll"] == outcome.quality.delta_nll
    assert understudy.inspect(outcome.path).delta_nll == outcome.quality.delta_nll
    with understudy.load(outcome.path, memory="1GiB") as model:
        assert "LOSSY, delta NLL " in model.understudy.plan.line()
