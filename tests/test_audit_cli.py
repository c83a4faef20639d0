"""`specopt audit` on what a server shows, and on what it cannot use."""

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.serve import audit as serving_audit
from vllm_specopt.benchmarks.serve.audit import with_audit
from vllm_specopt.cli.audit import BARS, picture
from vllm_specopt.cli.main import app
from vllm_specopt.evidence import BINS

ROOT = Path(__file__).parents[1]
TARGET = str(ROOT / "models" / "specopt-target")


def text_of(bins: list[int], method="exact", impossible=0, skipped=0, afresh: list[int] | None = None) -> str:
    labels = f'model_name="target",engine="0",method="{method}"'
    lines = [
        f'specopt:audited_tokens_total{{{labels},sweep="{sweep}",bin="{i:02d}"}} {float(n)}'
        for sweep, counts in (("noted", bins), ("afresh", afresh or [0] * BINS))
        for i, n in enumerate(counts)
    ]
    lines += [f"specopt:audit_impossible_tokens_total{{{labels}}} {float(impossible)}"]
    lines += [f"specopt:audit_skipped_tokens_total{{{labels}}} {float(skipped)}"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def serving():
    """A server of some text at /metrics; returns a function from the text to its URL."""
    started = []

    def serve(text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in started:
        server.shutdown()
        server.server_close()


def audit(*arguments: str):
    return CliRunner().invoke(app, ["audit", *arguments])


def test_an_even_server_is_cleared(serving):
    done = audit(serving("# HELP x y\n" + text_of([1000] * BINS, skipped=12)) + "/")
    assert done.exit_code == 0, done.output
    assert "target, engine 0, method exact: no sign of loss" in done.output
    assert "32,000 tokens" in done.output and "0 impossible tokens, 12 tokens not audited" in done.output
    assert f"|{BARS[4] * BINS}|" in done.output


def test_a_lossy_method_beside_a_lossless_one(serving):
    uneven = [1000 + 20 * i for i in range(BINS)]
    done = audit(serving(text_of([1000] * BINS) + text_of(uneven, "sigmoid", impossible=2)))
    assert done.exit_code == 1
    assert "method exact: no sign of loss" in done.output
    assert "method sigmoid: LOSSY" in done.output and "2 impossible tokens" in done.output


def test_rows_swept_anew_speak_for_themselves(serving):
    """What is wrong with the verification's own sums is diluted by the rows that were not swept anew."""
    afresh = [900] * (BINS // 2) + [1100] * (BINS // 2)
    for noted, said in (([30_000] * BINS, "LOSSY"), ([60_000 - count for count in afresh], "LOSSY")):
        done = audit(serving(text_of(noted, afresh=afresh)))
        assert said in done.output and f"{sum(noted) + sum(afresh):,} tokens" in done.output
    whole = [count + 30_000 for count in afresh]
    assert "no sign of loss" in audit(serving(text_of(whole))).output


def test_few_tokens_are_no_verdict(serving):
    done = audit(serving(text_of([3] * BINS)))
    assert done.exit_code == 1
    assert "no verdict yet: fewer than 1000 tokens" in done.output


def test_the_picture_is_as_uneven_as_the_counts():
    assert picture([0] * BINS) == BARS[0] * BINS
    assert picture([1] + [0] * (BINS - 1)) == BARS[-1] + BARS[0] * (BINS - 1)
    assert picture([150, 50] * (BINS // 2)) == (BARS[6] + BARS[2]) * (BINS // 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("http://127.0.0.1:9",), "http://127.0.0.1:9/metrics cannot be read"),
        (("http://127.0.0.1:9", "--speculative-config", "{}"), "a URL is of a server that runs already"),
        (("MODEL", "--follow"), "--follow goes with the URL of a running server"),
        (("MODEL", "--additional-config", "{"), "--additional-config is not JSON"),
        (("MODEL", "--additional-config", "[]"), "expected a JSON object"),
        (("MODEL", "--speculative-config", "3"), "expected a JSON object"),
        (("MODEL", "--additional-config", '{"specopt": 3}'), "neither a method nor a mapping"),
        (("MODEL", "--additional-config", '{"specopt": "exakt"}'), "--additional-config: specopt.method is 'exakt'"),
        (("/nope",), "/nope is no model folder (it has no config.json): name the target model."),
        (("models",), "models is no model folder"),
        (("no/such-model",), "the target model no/such-model is no folder and was not downloaded before"),
        (("127.0.0.1:18433",), "127.0.0.1:18433 is no model: if it is a running server, begin it with http://."),
        (("localhost:8000/", "--follow"), "begin it with http://"),
        ((TARGET, "--speculative-config", '{"model": "./nope"}'), "nope is no model folder"),
        ((TARGET, "--speculative-config", '{"model": "no/such-model"}'), "the draft model no/such-model is no folder"),
    ],
)
def test_bad_input_is_told_in_a_sentence(monkeypatch, arguments, message):
    def start(*_):
        raise AssertionError("a server starts")

    monkeypatch.setattr(serving_audit, "Server", start)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    done = audit(*arguments)
    assert done.exit_code == 2, done.exception
    assert message in done.output and done.output.count("\n") == 1


def test_a_server_that_does_not_start_is_told_in_a_sentence_and_its_log_stays(monkeypatch, tmp_path):
    script = tmp_path / "vllm"
    script.write_text("#!/bin/sh\necho 'ValueError: no room for it.'\nexit 4\n")
    script.chmod(0o755)
    monkeypatch.setattr(serving_audit, "vllm_script", lambda: str(script))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = audit(TARGET)
    (log,) = tmp_path.glob("specopt-audit-*.log")
    said = f"vLLM ended with status 4 before it was ready: ValueError: no room for it (its log: {log})."
    assert (done.exit_code, done.output) == (1, f"specopt audit: {said}\n")
    assert log.read_text() == "ValueError: no room for it.\n"


def test_a_server_without_an_audit(serving):
    done = audit(serving("vllm:num_requests_running 0.0\n"))
    assert done.exit_code == 2
    assert "has no audit: start it with" in done.output


def test_the_audit_is_added_to_any_option():
    assert with_audit(None) == {"specopt": {"audit": True, "method": "exact"}}
    assert with_audit(json.dumps({"specopt": "block", "x": 1})) == {
        "specopt": {"audit": True, "method": "block"},
        "x": 1,
    }
    assert with_audit('{"specopt": {"method": "stock", "audit": 0.5}}')["specopt"]["audit"] == 0.5
    with pytest.raises(CliError):
        with_audit("nonsense")
