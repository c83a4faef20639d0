"""`specopt ab`: order, arms, sizes, statistics and views, computed from plans and records without a server."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.ab_records import EXACT, REPAIRED, make_cell, make_plan, make_record

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.intervals import differs, paired_ratio
from vllm_specopt.benchmarks.serve import client, cluster, fit, plots, report, servers, stats
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import PLAIN, Point, with_repaired


def test_arms_take_turns_there_and_back():
    order = make_plan().cells()
    assert [cell.arm for cell in order[:3]] == ["stock-repaired", "exact", "stock-repaired (again)"]
    second = [cell for cell in order if cell.repeat == 1]
    assert [cell.arm for cell in second[:3]] == ["stock-repaired (again)", "exact", "stock-repaired"]
    assert len({cell.key for cell in order}) == len(order) == 3 * 2 * 2 * 4
    assert [cell.repeat for cell in order] == sorted(cell.repeat for cell in order)
    # A drift that is linear in time must not favour an arm: their mean places are equal.
    places = {arm: [i for i, cell in enumerate(order) if cell.arm == arm] for arm in {cell.arm for cell in order}}
    assert len({sum(each) for each in places.values()}) == 1


def test_servers_differ_by_their_arm_only():
    plan = make_plan()
    base, again = (servers.server_command(plan, arm, 1, Path("p")) for arm in (plan.baseline, plan.timed_arms()[-1]))
    exact = servers.server_command(plan, EXACT, 1, Path("p"))
    assert base == again
    assert base[:3] == [sys.executable, "-m", "vllm_specopt.benchmarks.serve.repaired"]
    at = exact.index("--additional-config")
    assert json.loads(exact[at + 1]) == {"specopt": {"method": "exact"}}
    assert exact[1:at] + exact[at + 2 :] == base[3:]
    on_gpu = make_plan(on_cpu=False, arms=(Arm("stock"), EXACT))
    command = servers.server_command(on_gpu, EXACT, 1, Path("p"))
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.300"
    own = make_plan(on_cpu=False, arms=(Arm("stock"), EXACT), serve_args=("--gpu-memory-utilization=0.2",))
    assert sum("gpu-memory" in part for part in servers.server_command(own, EXACT, 1, Path("p"))) == 1


def test_the_client_gets_the_same_prompts_in_every_arm():
    plan = make_plan()
    cells = [cell for cell in plan.cells() if cell.repeat == 1 and cell.concurrency == 8]
    commands = {tuple(client.command(plan, c, "URL", Path("r.json"))) for c in cells if c.point != "T = 0"}
    assert len(commands) == 1
    (command,) = (list(each) for each in commands)
    assert command[command.index("--seed") + 1] == "6"
    assert command[command.index("--top-p") + 1] == "0.9"
    assert command[command.index("--num-prompts") + 1] == "32"
    greedy = client.command(plan, next(c for c in cells if c.point == "T = 0"), "URL", Path("r.json"))
    assert "--top-p" not in greedy


def test_a_client_that_fails_says_why_in_a_line(tmp_path):
    def call(argv, log, timeout):
        log.write_text("Traceback (most recent call last):\n  File 'a'\nValueError: the prompt is too long.\n\n")
        return 1

    plan = make_plan()
    with pytest.raises(CliError) as caught:
        servers.run_cell(plan, plan.cells()[0], "URL", call, tmp_path)
    assert str(caught.value) == ("vllm bench serve failed (it ended with status 1): ValueError: the prompt is too long")


def test_stock_is_replaced_on_a_cpu_where_it_is_broken():
    default, notice = with_repaired([Arm("stock"), EXACT], True, (Point(0.0), Point(1.0)))
    assert [arm.name for arm in default] == ["stock-repaired", "exact"]
    assert "in the place of stock" in notice
    asked, notice = with_repaired([Arm("stock"), EXACT], False, (Point(0.7),))
    assert [arm.name for arm in asked] == ["stock-repaired", "stock", "exact"]
    assert "beside stock" in notice
    assert with_repaired([Arm("stock"), EXACT], True, (Point(0.0),)) == ([Arm("stock"), EXACT], None)


def test_a_real_difference_is_found_and_none_is_not_invented():
    rows = stats.compare(make_record(make_plan()))
    words = {(row["metric"], row["words"]) for row in rows if row["arm"] == "exact"}
    assert words == {("output tokens/s", "better"), ("TTFT median", "better"), ("TPOT median", "better"),
                     ("ITL p99", "better")}  # fmt: skip
    speeds = [row["ratio"] for row in rows if row["arm"] == "exact" and row["metric"] == "output tokens/s"]
    assert all(1.9 < each["low"] <= each["ratio"] <= each["high"] < 2.1 for each in speeds)
    same = [row for row in stats.compare(make_record(make_plan(), exact=1.0)) if row["arm"] == "exact"]
    assert {row["words"] for row in same} == {"no difference"}


def test_paired_ratio_is_a_t_interval_on_logarithms():
    from scipy.stats import ttest_rel

    ours, base = [20.0, 26.0, 22.0, 19.0], [10.0, 11.0, 10.5, 10.0]
    found = paired_ratio(ours, base)
    expected = ttest_rel([math.log(x) for x in ours], [math.log(x) for x in base]).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found["low"] < found["ratio"] < found["high"]
    assert differs(found) is True and differs(paired_ratio(base, base[::-1])) is False
    assert paired_ratio([3.0], [2.0]) == {"ratio": pytest.approx(1.5), "low": None, "high": None, "pairs": 1}
    # Equal ratios have no spread.
    assert paired_ratio([4.0, 2.0], [2.0, 1.0])["low"] == pytest.approx(2.0)


def test_a_ratio_within_the_noise_is_no_difference():
    clear = {"ratio": 1.03, "low": 1.02, "high": 1.04, "pairs": 4}
    assert stats.verdict(clear, {"ratio": 1.0, "low": 0.99, "high": 1.01, "pairs": 4}, True) == "better"
    assert stats.verdict(clear, {"ratio": 1.0, "low": 0.99, "high": 1.01, "pairs": 4}, False) == "worse"
    # Noise of 0.96 one way could as well have been 1.04 the other way.
    noise = {"ratio": 0.98, "low": 0.96, "high": 0.999, "pairs": 4}
    assert stats.verdict(clear, noise, True) == "no difference"
    assert stats.verdict({**clear, "low": 0.99}, None, True) == "no difference"
    assert stats.verdict({**clear, "low": None}, noise, True).startswith("one pair")
    assert stats.verdict(None, noise, True) == "not measured"


def test_pairs_follow_the_repeat_and_a_missing_cell_costs_its_pair_only():
    record = make_record(make_plan(), wobble=0.0)
    del record["cells"]["exact|T = 0|c1|r2"]
    found = stats.ratio(record, "exact", "T = 0", 1, "output tokens/s")
    assert found["pairs"] == 3
    assert found["ratio"] == pytest.approx(2.0)


def test_acceptance_is_pooled_by_drafts():
    short = make_cell(1) | {"num_drafts": 30, "draft_tokens": 60, "accepted_tokens": 6, "accepted_per_position": [0.2]}
    found = stats.acceptance([make_cell(1), short])
    assert found["rate"] == pytest.approx(26 / 100)
    assert found["length"] == pytest.approx(1 + 26 / 40)
    assert found["positions"] == pytest.approx([(8 + 6) / 40, 6 / 40, 4 / 40, 2 / 40])
    assert stats.acceptance([{}])["rate"] is None


def test_the_client_result_is_kept_as_rates_and_quantiles():
    bench = {
        "completed": 2, "failed": 0, "duration": 1.0, "total_output_tokens": 7, "request_throughput": 2.0,
        "output_throughput": 7.0, "ttfts": [0.1, 0.3], "itls": [[0.2, 0.2], [0.4]], "output_lens": [5, 2],
        **{f"{key}_{name}_ms": 1.0 for name in ("ttft", "tpot", "itl") for key in ("mean", "median", "p99")},
    }  # fmt: skip
    found = client.summarise(bench)
    assert found["quantiles"]["ttft"][0] == 0.1 and found["quantiles"]["ttft"][-1] == 0.3
    # Tokens that arrive together count in the time per token, not in the gaps between arrivals.
    assert found["quantiles"]["tpot"][0] == pytest.approx(0.1)
    assert found["quantiles"]["itl"][0] == 0.2
    assert "num_drafts" not in found


def test_the_picture_has_what_was_measured(tmp_path):
    record = make_record(make_plan())
    plots.draw(record, tmp_path / "all.png")
    plots.draw(record | {"cells": {}, "arms": {}}, tmp_path / "empty.png")
    sizes = [(tmp_path / name).stat().st_size for name in ("all.png", "empty.png")]
    assert sizes[0] > 3 * sizes[1] > 0


def test_the_picture_of_one_run_has_no_interval_and_a_wide_one_leaves_room(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    single = make_record(make_plan(repeats=1, noise=False, concurrency=(8,)))
    for arm, share in (("stock-repaired", 0.11), ("exact", 0.0093)):
        single["arms"][arm]["scopes"] = {"T = 0": {"sampling_share": share}}
    plots.draw(single, tmp_path / "one.png")
    first = drawn[0].axes[0]
    # What an error bar consists of.
    assert not first.lines and not first.collections
    assert first.get_xlabel() == "requests in flight"
    assert first.get_title() == "T = 0\nsampling's share of a step:\nstock-repaired 11 %, exact 0.93 %"
    plots.draw(make_record(make_plan(), wobble=1.0), tmp_path / "wide.png")
    assert drawn[1].axes[0].collections
    ratios = [axes for axes in drawn[1].axes if axes.get_xlabel().startswith("tokens/s over")]
    assert len(ratios) == 2 and all(axes.get_xscale() == "log" for axes in ratios)


def test_the_views_say_what_failed_and_what_differs():
    record = make_record(make_plan())
    assert report.exit_code(record) == 0
    text = report.markdown(record)
    assert "exact, T = 0: 2 of 2 greedy texts identical to those of stock-repaired" in text
    assert "expected by chance" in text
    record["arms"]["exact"]["texts"]["T = 0"] = [[1, 2], [3, 5]]
    assert report.exit_code(record) == 1
    assert "first difference: prompt 1, position 1" in report.markdown(record)
    # Where the baseline's second process differs too, so may ours.
    record["arms"]["stock-repaired (again)"]["texts"]["T = 0"] = [[1, 2], [3, 6]]
    assert report.exit_code(record) == 0
    record["arms"]["exact"]["error"] = "it died"
    assert report.exit_code(record) == 1
    assert "exact: FAILED: it died" in report.markdown(record)


def test_seeded_texts_are_compared_with_those_without_speculation():
    plan = make_plan(plain=True, noise=False)
    record = make_record(plan)
    assert (
        list(record["arms"]) == ["stock-repaired", "exact", PLAIN.name] and PLAIN.name not in record["config"]["arms"]
    )
    assert list(record["arms"][PLAIN.name]["texts"]) == ["T = 1, top-p 0.9"]
    said = f"exact, T = 1, top-p 0.9: 2 of 2 seeded texts identical to those of {PLAIN.name}"
    assert said in report.markdown(record)
    record["arms"]["exact"]["texts"]["T = 1, top-p 0.9"] = [[1, 2], [9]]
    assert "1 of 2 seeded texts" in report.markdown(record) and report.exit_code(record) == 0
    command = servers.server_command(plan, PLAIN, 1, Path("p"))
    assert "--speculative-config" not in command and "--additional-config" in command


def test_sampling_and_the_parts_of_a_step_are_told():
    record = make_record(make_plan())
    for arm, share in (("stock-repaired", 0.41), ("exact", 0.02)):
        found = {"steps": 10, "milliseconds": {"forward": 100 * (1 - share), "sample": 100 * share}}
        record["arms"][arm]["scopes"] = {"T = 0": found | {"sampling_share": share}}
    said = [line for line in report.outcome(record) if "sampling" in line]
    assert said == ["exact, T = 0: sampling went from 41 % to 2 % of a step, in a profiled burst"]
    headings, cells = report.step_rows(record)
    assert headings[4:6] == ("forward", "sample")
    assert cells[0] == ("T = 0", "stock-repaired", "10", "10.0", "5.9", "4.1", "41.0 %", "1.69")


def test_stock_as_it_comes_is_marked_on_a_cpu():
    plan = make_plan(arms=(REPAIRED, Arm("stock"), EXACT))
    marked = {row[:3] for row in report.rows(make_record(plan)) if "*" in row[4]}
    assert marked == {("T = 1, top-p 0.9", "1", "stock"), ("T = 1, top-p 0.9", "8", "stock")}


def test_repeats_from_a_cluster_make_one_record():
    plan = make_plan()
    whole, record = make_record(plan), make_record(plan) | {"cells": {}, "arms": {}}
    for repeat in range(3):
        part = {"arms": {}, "cells": {}, "failed_cells": {}}
        for arm in plan.timed_arms():
            own = replace(plan, only=(arm.name, repeat))
            assert [each.name for each in own.all_arms()] == [arm.name]
            assert {(cell.arm, cell.repeat) for cell in own.cells()} == {(arm.name, repeat)}
            part["arms"][arm.name] = whole["arms"][arm.name] | {"peak_mib": 100 + repeat}
            part["cells"] |= {cell.key: whole["cells"][cell.key] for cell in own.cells()}
        cluster.add(record, part)
    assert record["cells"] == {key: cell for key, cell in whole["cells"].items() if not key.endswith("r3")}
    assert record["arms"]["exact"]["peak_mib"] == 100
    lost = {"repeat": 3, "host": "unknown", "gpus": [], "outcome": "lost: the worker died"}
    record["placements"] = [{"repeat": 0, "host": "a (10.0.0.1)", "gpus": ["1"], "outcome": "done"}, lost]
    text = report.markdown(record)
    assert "| 1 | a (10.0.0.1), GPU 1 | done |" in text and "| 4 | unknown | lost: the worker died |" in text
    assert "Ray" not in report.markdown(whole)


def test_an_empty_record_has_views_too():
    record = make_record(make_plan()) | {"cells": {}, "arms": {}}
    assert "not measured" in report.markdown(record)


def rehearsals(plan, load: float, overhead: float = 2.0) -> list[fit.Rehearsal]:
    """As if one request in flight took `load` seconds and more at once a little longer."""
    return [
        fit.Rehearsal(str(point), slots, fit.rehearsal_requests(slots), load * 4, overhead)
        for point in plan.points
        for slots in plan.concurrency
    ]


def test_a_plan_fits_into_the_minutes_asked_for():
    plan = make_plan(minutes=10.0, concurrency=(1, 8, 32))
    quick = fit.fit(plan, rehearsals(plan, 0.01), 600)
    assert quick["requests"] == {slots: plan.full_requests(slots) for slots in plan.concurrency}
    assert quick["repeats"] == plan.repeats
    slower = fit.fit(plan, rehearsals(plan, 0.5), 600)
    assert slower["repeats"] == plan.repeats and slower["seconds"] <= 540
    assert all(slots <= slower["requests"][slots] < plan.full_requests(slots) for slots in (8, 32))
    assert all(requests % slots == 0 for slots, requests in slower["requests"].items())
    slow = fit.fit(plan, rehearsals(plan, 2.4), 600)
    assert slow["repeats"] == 2 and slow["requests"] == {1: 8, 8: 8, 32: 32}
    # The least there is may still be too long, which the caller says.
    assert fit.fit(plan, rehearsals(plan, 20.0), 600)["seconds"] > 600


def test_a_record_keeps_the_sizes_chosen_for_it():
    plan = make_plan(minutes=10.0)
    found = fit.fit(plan, rehearsals(plan, 1.0), 300)
    record = json.loads(json.dumps({"fit": found | {"asked": fit.asked(plan)}}))
    again = fit.fitted(plan, record)
    assert again.describe() == plan.fitted(found).describe() != plan.describe()
    assert again.requests(8) == found["requests"][8] and again.repeats == found["repeats"]
    other = make_plan(minutes=20.0)
    assert fit.fitted(other, record) == other
    assert fit.fitted(plan, {}) == plan
