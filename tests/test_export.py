"""Encoders in other tools' files: their own code gives the same states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from superb_probe import cli
from superb_probe.errors import RequestError
from superb_probe.export import export_upstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import FAMILIES


def test_transformers_gives_the_same_states(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    upstream = load_upstream("transformer_hubert", size="test", random=1)
    written = export_upstream(upstream, "transformers", tmp_path / "out")
    theirs = transformers.HubertModel.from_pretrained(written.path).eval()
    wavs = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = torch.stack(theirs(wavs, output_hidden_states=True).hidden_states)
        ours = upstream(wavs, torch.tensor([4000])).states
        other = load_upstream("transformer_hubert", size="test", random=2)(wavs, torch.tensor([4000])).states
    assert (states - ours).abs().max() < 1e-5
    assert (states - other).abs().max() > 1e-2  # the comparison can fail


@pytest.mark.parametrize(
    "name", ["transformer_hubert", "mamba_hubert", "mamba_mlp_hubert_causal", "mamba_hubert_causal"]
)
def test_the_s3prl_file_holds_the_encoder(name: str, tmp_path: Path) -> None:
    """What s3prl's hubert_local reads: its keys, and the weights under fairseq's names; read back, the same states."""
    options = {} if "causal" not in name else {"causal_front_end": False}
    upstream = load_upstream(name, size="test", random=1, **options)
    written = export_upstream(upstream, "s3prl", tmp_path)
    content = torch.load(written.path, weights_only=True)
    assert set(content) == {"task_cfg", "model_cfg", "model_weight", "dictionaries_symbols"}
    again = load_upstream(name, checkpoint=written.path)
    wavs = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(wavs, torch.tensor([4000])).states, upstream(wavs, torch.tensor([4000])).states)
    assert ("s3prl 0.4.18 has no such layers" in written.reader) == name.startswith("mamba")
    with pytest.raises(RequestError, match="exists"):
        export_upstream(upstream, "s3prl", tmp_path)


def test_what_cannot_be_said_names_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["export", "transformers", "mamba_hubert", str(tmp_path / "a"), "--size", "test", "--random", "0"])
        == 2
    )
    said = capsys.readouterr().err
    assert "Transformer layers only" in said
    assert said.rstrip().endswith("What transformers can be given: transformer_hubert.")
    assert cli.main(["export", "s3prl", "fbank", str(tmp_path / "b")]) == 2
    assert "fbank is no HuBERT of this project" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", ["s3prl", "transformers"])
def test_the_list_of_what_can_be_given_is_true(tool: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        export_upstream(load_upstream("fbank"), tool, tmp_path / "no")
    able = str(error.value).rpartition("one of ")[2].rstrip(".").split(", ")
    for name in FAMILIES:
        upstream = load_upstream(name, size="test", random=0)
        if name in able:
            export_upstream(upstream, tool, tmp_path / name)
        else:
            with pytest.raises(RequestError):
                export_upstream(upstream, tool, tmp_path / name)
