"""miniature/demo_table.py, on made-up scores."""

import json

import pytest

from miniature import demo_table

ROWS = {"untrained": (0.41, 0.32, 0.05), "stage1": (0.123, 0.85, 0.2), "stage2": (0.13, 0.84, 0.3)}
MEAN_TARGET = (0.36, 0.48, 0.01)


def named(scores):
    return dict(zip(("abs_rel", "delta1", "boundary_f1"), scores))


def test_the_table_has_its_columns_in_order(capsys):
    demo_table.print_table([("one", named((0.1234, 0.5, 0.25))), ("two", named((1, 0, 0.0006)))])
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-3:] == ["AbsRel", "delta1", "F1"]
    assert [row.split() for row in rows] == [["one", "0.123", "0.500", "0.250"],
                                             ["two", "1.000", "0.000", "0.001"]]
    assert len({len(line) for line in (head, *rows)}) == 1


@pytest.fixture()
def demo(tmp_path, monkeypatch):
    """The folder of a demo, of which only the scores are there; what main() draws, as a list."""
    for name, scores in ROWS.items():
        (tmp_path / f"scores_{name}").mkdir()
        (tmp_path / f"scores_{name}/metrics.json").write_text(
            json.dumps({"miniature": named(scores)}))
    drawn = []
    monkeypatch.setattr(demo_table, "mean_target_scores", lambda: named(MEAN_TARGET))
    monkeypatch.setattr(demo_table.DepthMaster, "from_file", lambda path: path.parent.name)
    monkeypatch.setattr(demo_table, "draw", lambda *given: drawn.append(given))
    monkeypatch.setattr(demo_table, "draw_edges", lambda *given: drawn.append(given))
    monkeypatch.setattr("sys.argv", ["demo_table.py", str(tmp_path)])
    return tmp_path, drawn


def test_every_row_has_its_own_scores(demo, capsys):
    demo_table.main()
    printed = capsys.readouterr().out
    rows = [line.rsplit(maxsplit=3) for line in printed.splitlines()[2:6]]
    assert [row[1:] for row in rows] == [["0.410", "0.320", "0.050"], ["0.360", "0.480", "0.010"],
                                         ["0.123", "0.850", "0.200"], ["0.130", "0.840", "0.300"]]
    for words, row in zip(("untrained", "mean training target", "stage 1", "stage 2"), rows):
        assert words in row[0]
    assert "AbsRel after stage 1 / untrained: 0.30; F1 after stage 2 / stage 1: 1.50" in printed


def test_the_figures_are_of_the_trained_models(demo, capsys):
    folder, drawn = demo
    demo_table.main()
    assert drawn == [("stage2", folder / "figure.png"),
                     ({"stage 1": "stage1", "stage 2": "stage2"}, folder / "edges.png")]
    assert f"{folder / 'figure.png'}" in capsys.readouterr().out.splitlines()[-1]
