"""What a record says of how it was made."""

from vllm_specopt.benchmarks import record


def test_a_commit_that_git_does_not_know_is_told(monkeypatch):
    monkeypatch.delenv("SPECOPT_COMMIT", raising=False)
    here = record.conditions(["--rounds", "5", "a b"], "python -m bench")
    assert here["command"] == "python -m bench --rounds 5 'a b'"
    assert record.conditions([], "specopt demo")["command"] == "specopt demo"
    monkeypatch.setenv("SPECOPT_COMMIT", "0123abc")
    told = record.conditions([])
    assert told["git"] == {"commit": "0123abc", "dirty": False} != here["git"]
