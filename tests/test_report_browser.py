"""The report in a real browser: it opens without an error and without a network, and shows what the files hold."""

import time

import pandas as pd
import pytest

from browser import MISSING, browser, is_available, open_report
from opo_trl.report import write_report
from spoilt_runs import TITLES, spoilt_run
from test_report import log_of, make_rows, make_run

pytest.importorskip("plotly", reason="the report needs plotly: pip install plotly")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason=MISSING),
]

HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\">"
ALL_ROWS = """
const rows = [];
for (;;) {
  document.querySelectorAll("tr[data-row]").forEach((row) => rows.push(Number(row.dataset.row)));
  const next = document.querySelector(".next");
  if (next.disabled) return rows;
  next.click();
}
"""


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


def rows_shown(driver):
    """Numbers of the completions on all pages."""
    shown = driver.execute_script(ALL_ROWS)
    assert len(shown) == len(set(shown))
    assert driver.execute_script("return document.getElementById('shown').textContent").startswith(f"{len(shown)} ")
    return set(shown)


def click(driver, name):
    driver.execute_script(f"document.querySelector('[data-filter={name}]').click()")


def choose(driver, name, value):
    driver.execute_script(
        "const box = document.getElementById(arguments[0]);"
        "box.value = arguments[1]; box.dispatchEvent(new Event('input'));", name, value
    )  # fmt: skip


def errors(driver):
    return [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_curves_filters_and_search(tmp_path, driver):
    tables = {step: make_rows(step, groups=10, seed=2) for step in (1, 2, 3)}
    tables[2] = [row | {"opo/split": "eval"} for row in tables[2]]
    tables[3][7] |= {"completion": HOSTILE, "prompt": tables[3][7]["prompt"]}
    values = [0.5, None, 0.25, 1.0]
    log = log_of(
        reward=values,
        opo__baseline=values,
        time__generate=[1.0] * 4,
        time__update=[2.0] * 4,
        own=[1.0, 2.0] * 2,
        learning_rate=[1e-3] * 4,
        completions__clipped_ratio=[0.5, 1.0] * 2,
        entropy=[3.86, 3.88, 3.92, 3.9],
    )
    log.append({"step": 4, "eval_reward": 0.75})
    open_report(driver, write_report(make_run(tmp_path, tables, log)))
    assert driver.title == f"{tmp_path.name} - opo-trl report"

    drawn = driver.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.data.map((trace) =>"
        "[trace.meta, trace.x, trace.y, trace.type]))"
    )
    points = {name: (x, y, kind) for chart in drawn for name, x, y, kind in chart}
    assert points["reward"] == ([1, 3, 4], [0.5, 0.25, 1.0], "scatter")
    assert points["eval_reward"] == ([4], [0.75], "scatter")
    assert points["time/update"] == ([1, 2, 3, 4], [2.0] * 4, "bar")
    constant = "return document.querySelector('.constant').textContent"
    assert driver.execute_script(constant) == "Constant: learning_rate 0.001"
    ranges = driver.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map((plot) =>"
        "[plot.data[0].meta, plot._fullLayout.yaxis.range])"
    )
    least, most = ({name: each[end] for name, each in ranges} for end in (0, 1))
    assert most["completions/clipped_ratio"] < 1.05, "a fraction"
    assert (least["entropy"], least["reward"] > 0) == (0, True), "from 0 on where the curve is flat"
    assert "own" not in points, "other metrics are drawn when they are asked for"
    driver.execute_script("document.querySelector('#charts > details').open = true")
    time.sleep(1)
    assert driver.execute_script("return document.querySelectorAll('#charts > details .js-plotly-plot').length") == 2
    marks = driver.execute_script("return document.querySelectorAll('.chart .point').length")
    assert marks >= 3 + 1 + 4 + 4 + 4, "points that are really drawn"

    frame = pd.DataFrame([row for step in (1, 2, 3) for row in tables[step]])
    groups = frame.groupby([frame["step"], frame["opo/group"]])["opo/reward"]
    highest, lowest = groups.transform("max"), groups.transform("min")
    expected = {
        "positive": frame["opo/reward"] > 0,
        "not_positive": frame["opo/reward"] <= 0,
        "none_positive": highest <= 0,
        "all_equal": highest == lowest,
        "truncated": frame["opo/truncated"],
        "unscorable": frame["opo/reward"].isna(),
    }
    assert rows_shown(driver) == set(frame.index)
    for name, rows in expected.items():
        assert 0 < rows.sum() < len(frame)
        click(driver, name)
        assert rows_shown(driver) == set(frame.index[rows]), name
        click(driver, name)
    click(driver, "truncated")
    click(driver, "none_positive")
    assert rows_shown(driver) == set(frame.index[expected["truncated"] & expected["none_positive"]]), "both at once"
    choose(driver, "split", "train")
    assert rows_shown(driver) == set(
        frame.index[expected["truncated"] & expected["none_positive"] & (frame["opo/split"] == "train")]
    )
    click(driver, "truncated")
    click(driver, "none_positive")
    choose(driver, "split", "")
    choose(driver, "step", "3")
    assert rows_shown(driver) == set(frame.index[frame["step"] == 3])
    marks = "return [...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.layout.shapes[0].x0)"
    assert set(driver.execute_script(marks)) == {3}, "the chosen step is marked on every curve"
    choose(driver, "query", "SCRIPT>document")
    assert rows_shown(driver) == {87}
    text = driver.execute_script("return document.querySelector('td.wide .text').textContent")
    assert text == HOSTILE
    assert driver.title != "taken over"
    labels = "return [...document.querySelectorAll('#filters button')].map((button) => button.textContent)"
    assert all(label.endswith(("(0)", "(1)")) for label in driver.execute_script(labels)), "of what the search finds"
    choose(driver, "query", "in no completion")
    assert rows_shown(driver) == set()
    assert not driver.execute_script("return document.getElementById('nothing-found').hidden")
    driver.execute_script("document.querySelector('#nothing-found .reset').click()")
    assert rows_shown(driver) == set(frame.index)
    click(driver, "truncated")
    assert driver.execute_script("return document.activeElement.dataset.filter") == "truncated"
    assert errors(driver) == []


def test_filters_judge_by_the_chosen_function(tmp_path, driver):
    rows = make_rows(1, groups=6)
    for number, row in enumerate(rows):
        row |= {"right": float(number % 3 == 0), "short": -0.1 * number}
        row.pop("opo/reward")
        row.pop("scored")
    open_report(driver, write_report(make_run(tmp_path, {1: rows}, log_of(reward=[0.5, 0.6]))))
    click(driver, "positive")
    assert rows_shown(driver) == set(range(0, len(rows), 3))
    choose(driver, "judge", "1")
    assert rows_shown(driver) == set()
    click(driver, "positive")
    click(driver, "not_positive")
    assert rows_shown(driver) == set(range(len(rows)))
    assert errors(driver) == []


def test_token_log_probabilities_and_the_dark_theme(tmp_path):
    rows = make_rows(1, groups=2)
    for row in rows:
        row |= {"completion": "ab", "opo/tokens": ["a", "b", "<eos>"], "opo/token_logps": [-0.5, -4.0, float("nan")]}
    rows[5] |= {"opo/tokens": None, "opo/token_logps": None}
    path = write_report(make_run(tmp_path, {1: rows}, log_of(reward=[0.5, 0.6])))
    with browser(dark=True) as driver:
        open_report(driver, path)
        tokens = (
            "return [...document.querySelectorAll('#groups .token')].map((token) => [token.textContent, token.title])"
        )
        shown = driver.execute_script(tokens)
        assert len(shown) == 3 * (len(rows) - 1)
        assert shown[:3] == [["a", "log p = -0.5, p = 0.607"], ["b", "log p = -4, p = 0.0183"], ["<eos>", ""]]
        colours = driver.execute_script(
            "return [...document.querySelectorAll('#groups .token')].slice(0, 2)"
            ".map((token) => getComputedStyle(token).backgroundColor)"
        )
        strengths = [float(colour.split(",")[-1].strip(" )")) for colour in colours]
        assert strengths == pytest.approx([0.076, 0.608], abs=0.01)
        driver.execute_script("document.getElementById('colour').click()")
        assert driver.execute_script(tokens) == []
        background = "return getComputedStyle(document.body).backgroundColor"
        assert driver.execute_script(background) == "rgb(20, 23, 28)"
        driver.execute_script("document.getElementById('theme').click()")
        assert driver.execute_script(background) == "rgb(246, 247, 249)"
        open_report(driver, path)
        assert driver.execute_script(background) == "rgb(246, 247, 249)", "the chosen theme stays"
        assert errors(driver) == []


@pytest.mark.parametrize("kind", TITLES)
def test_the_first_finding_shows_its_completions(tmp_path, driver, kind):
    open_report(driver, write_report(spoilt_run(kind, tmp_path)))
    top = "const card = document.querySelector('.finding'); return [card.firstChild.textContent, card.offsetTop]"
    title, position = driver.execute_script(top)
    assert title == TITLES[kind]
    assert position < 300, "without scrolling"
    driver.execute_script("document.querySelector('.finding button').click()")
    assert rows_shown(driver) == set(range(16))
    assert driver.execute_script("return document.querySelectorAll('.finding').length") == 1
    assert driver.execute_script("return document.querySelector('.solution').textContent") == "solution 12"
    if kind == "no boxes":
        choose(driver, "query", "no answer")
        assert rows_shown(driver) == set(range(16)), "the verdict is searched as well"
    assert errors(driver) == []


def test_ten_thousand_completions_stay_usable(tmp_path, driver):
    tables = {step: make_rows(step, groups=63, size=8) for step in range(1, 21)}
    path = write_report(make_run(tmp_path, tables, log_of(reward=[0.5] * 20)), max_completions=10_080)
    start = time.perf_counter()
    open_report(driver, path)
    assert time.perf_counter() - start < 60  # 1 s alone on a core
    assert driver.execute_script("return document.getElementById('shown').textContent").startswith("10080 completions")
    assert driver.execute_script("return document.querySelectorAll('tr[data-row]').length") < 200, "one page at a time"
    frame = pd.DataFrame([row for rows in tables.values() for row in rows])
    start = time.perf_counter()
    click(driver, "truncated")
    driver.execute_script("return document.getElementById('groups').offsetHeight")  # laid out
    assert time.perf_counter() - start < 15  # 0.1 s alone on a core
    shown = driver.execute_script("return document.getElementById('shown').textContent")
    assert shown.startswith(f"{frame['opo/truncated'].sum()} completions")
    assert errors(driver) == []
