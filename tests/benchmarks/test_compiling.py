"""What compiling costs, without the cost."""

from benchmarks import compiling


def test_operations_graphs_and_seconds_are_printed(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "accelerate", lambda parts, **how: asked.append(how))
    small = ["training.batch_size=4", "dataset.train.images=32", "backbone.hidden_dim=16", "backbone.heads=2"]
    compiling.main([*small, "backbone.depth=1", "device=cpu"])
    shown = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert asked == [{"compile": True, "graph": False}]
    assert list(shown) == [
        "operations of an eager step",
        "graphs",
        "graph breaks",
        "compiled again",
        "seconds",
        "seconds of all cores",
    ]
    assert int(shown["operations of an eager step"].replace(",", "")) > 300
    assert shown["graphs"] == shown["compiled again"] == "0"
