"""The dashboard keeps the habits that make it usable anywhere: templated source, intervals that fit the zoom, units, descriptions."""

from __future__ import annotations

from typing import Any


def test_every_panel_is_templated_and_explained(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        title = panel["title"]
        assert panel["description"].strip(), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", title
            assert ("[" in target["expr"]) == ("[$__rate_interval]" in target["expr"]), title
            assert "[" not in target["expr"].replace("[$__rate_interval]", ""), title
            if any(prefix in target["expr"] for prefix in ("vllm:", "sedac_tokens", "sedac_exited", "sedac_threshold", "sedac_draft", "sedac_step")):
                assert 'model_name=~"$model_name", engine=~"$engine"' in target["expr"], title


def test_panels_neither_overlap_nor_leave_the_grid(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert box["x"] + box["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_ids_and_titles_are_unique(dashboard: dict[str, Any]) -> None:
    for key in ("id", "title"):
        values = [(panel["type"] == "stat", panel[key]) for panel in dashboard["panels"]]
        assert len(values) == len(set(values))
