import io
import sys

from kdaif_fast.distill.runs.progress import TrainingProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(monkeypatch, stream, progress, steps=10, done=0, n=15):
    monkeypatch.setattr(sys, "stderr", stream)
    with TrainingProgress(epochs=3, steps=steps, progress=progress, done=done) as bar:
        for _ in range(n):
            bar.step()
        bar.show(accuracy=0.941, mean_weight=0.98, share_below_1=0.125, seconds={"student": 1.25, "influence": 0.5})
    return stream.getvalue()


def test_a_terminal_sees_everything(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    seen = drawn(monkeypatch, Terminal(), None).split("\r")[-1]
    assert "epoch 2/3 |" in seen
    assert "15/30 [" in seen
    assert "accuracy 94.1 %, mean w 0.980, w < 1: 12.5 %, student 1.2 s, influence 0.5 s" in seen


def test_nothing_else_does(monkeypatch):
    assert drawn(monkeypatch, io.StringIO(), None) == ""
    assert drawn(monkeypatch, Terminal(), False) == ""
    assert "epoch 2/3" in drawn(monkeypatch, io.StringIO(), True)


def test_a_run_that_goes_on_and_one_without_a_known_end(monkeypatch):
    assert "epoch 3/3" in drawn(monkeypatch, Terminal(), None, done=20, n=10)
    assert "30/30" in drawn(monkeypatch, Terminal(), None, done=20, n=10)
    assert "15step" in drawn(monkeypatch, Terminal(), None, steps=None)
    # The last step of an epoch belongs to it.
    assert "epoch 2/3" not in drawn(monkeypatch, Terminal(), None, n=10)


def test_what_is_not_known_is_not_shown():
    with TrainingProgress(1, 1, progress=False) as bar:
        bar.show(mean_weight=float("nan"))
        assert bar.text == "mean w nan"
        bar.show()
        assert bar.text == ""
