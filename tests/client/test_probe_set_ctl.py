"""`sedac ctl probe-set` and the client's uploads against a real control service."""

from __future__ import annotations

import json

import pytest
from sedac.client import probe_files
from sedac.errors import ArtifactError, ProbeSetExists, ProbeSetNotFound

from testing.control.engines import FIRST
from testing.probe_sets import make_set


@pytest.fixture
def directory(tmp_path):
    return make_set("fresh").write(tmp_path / "set")


def test_a_set_is_uploaded_listed_shown_downloaded_and_deleted(ctl, directory, tmp_path):
    done = ctl("probe-set", "upload", str(directory))
    assert done.exit_code == 0, done.output
    assert "LOADABLE" in done.stdout
    assert "upload" in done.stderr, "the progress bar stays off standard output"
    sha256 = make_set("fresh").sha256
    uploaded = json.loads(ctl("probe-set", "upload", str(directory), "--json").stdout)
    assert (uploaded["name"], uploaded["sha256"], uploaded["rank"]) == ("fresh", sha256, 4), "the same again is answered as before"
    assert [p["name"] for p in json.loads(ctl("probe-set", "list", "--json").output)] == ["fresh"]
    assert sha256[:12] in ctl("probe-set", "list").output
    assert sha256 in ctl("probe-set", "show", "fresh").output
    copy = tmp_path / "copies" / "fresh"
    assert ctl("probe-set", "download", "fresh", str(copy)).exit_code == 0
    for name in ("manifest.json", "probes.safetensors"):
        assert (copy / name).read_bytes() == (directory / name).read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == ["fresh"], "nothing is left of the staging"
    again = ctl("probe-set", "download", "fresh", str(copy))
    assert again.exit_code == 1
    assert "is there already; name a new or empty directory" in again.stderr
    assert ctl("probe-set", "delete", "fresh").exit_code == 0
    gone = ctl("probe-set", "show", "fresh")
    assert gone.exit_code == 1
    assert "fresh" in gone.stderr
    assert json.loads(ctl("probe-set", "list", "--json").output) == []


def test_a_set_that_an_engine_cannot_load_says_why(ctl, make_engine, directory):
    make_engine(max_rank=0, levels_sha256="3" * 64).pushes.get(timeout=10)
    assert ctl("probe-set", "upload", str(directory)).exit_code == 0
    shown = ctl("probe-set", "show", "fresh").output
    assert "engine e1" in shown
    assert "its rank 4 is over 0, the most that is attached; restart the engine with it" in shown


def test_a_broken_set_is_refused_here_or_there_and_nothing_is_kept(ctl, client, tmp_path):
    broken = make_set("broken").write(tmp_path / "broken")
    weights = broken / "probes.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    here = ctl("probe-set", "upload", str(broken))
    assert here.exit_code == 1
    assert "its manifest states" in here.stderr
    hostile = make_set("hostile", changes={"2.out.bias": ("F32", (1,), b"\x00\x00\xc0\x7f")}).write(tmp_path / "hostile")
    there = ctl("probe-set", "upload", str(hostile))
    assert there.exit_code == 1, there.output
    assert list(client.list_probe_sets()) == []
    assert ctl("probe-set", "upload", str(tmp_path / "absent")).exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in ctl("probe-set", "upload", str(tmp_path / "empty")).stderr


def test_errors_of_probe_sets_come_back_as_they_were_raised(client, directory, tmp_path):
    client.upload_probe_set(directory)
    with pytest.raises(ProbeSetExists):
        client.upload_probe_set(make_set("fresh", seed=1).write(tmp_path / "other"))
    for call in (client.get_probe_set, client.delete_probe_set, lambda name: client.download_probe_set(name, tmp_path / "new")):
        with pytest.raises(ProbeSetNotFound):
            call("absent")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ProbeSetNotFound):
        client.download_probe_set("fresh", tmp_path / "new", sha256="0" * 64)
    client.update_policy(FIRST)


def test_progress_grows_to_all_there_is(client, directory, monkeypatch, tmp_path):
    monkeypatch.setattr(probe_files, "CHUNK_BYTES", 1000)
    total = (directory / "probes.safetensors").stat().st_size
    for transfer in (
        lambda progress: client.upload_probe_set(directory, progress=progress),
        lambda progress: client.download_probe_set("fresh", tmp_path / "copy", progress=progress),
    ):
        seen: list[tuple[int, int]] = []
        transfer(lambda done, of, seen=seen: seen.append((done, of)))
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1] == (total, total)


def test_a_download_that_is_not_what_was_announced_leaves_nothing(tmp_path):
    parts = list(make_set("fresh").make_parts())
    with pytest.raises(ArtifactError, match="arrived with 1000 bytes"), probe_files.ProbeSetDownload(tmp_path / "new") as download:  # noqa: PT012
        for part in parts[:2]:
            download.take(part)
        download.finish()
    assert list(tmp_path.iterdir()) == []
