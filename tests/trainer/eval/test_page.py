"""The page of a run: what stands on it, that no text acts on it, and that it asks for nothing."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from helpers.tiny import byte_tokenizer

from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.eval import page
from opsdc.eval.arms import write_summary
from opsdc.eval.cost import Rates, cost_rows, duration, seconds_by_phase, tokens_of_training
from opsdc.eval.curves import Series, draw
from opsdc.eval.page import write_page
from opsdc.models.load import decode, pieces
from opsdc.record.lines import read_lines, write_text
from opsdc.train import OPSDCTrainer

HOSTILE = (
    "</script></div></pre><script>console.error('ran')</script><img src=http://evil.example/x.png "
    "onerror=alert(1)>\"'><style>*{display:none}</style>{{ 7*7 }}{% raw %}<!-- "
    "\u202eright to left\u2066 \x00\x1b[31m <link rel=stylesheet href=//evil.example/a.css>"
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Tags(HTMLParser):
    """The tags of a page, and its text outside of `style`."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open[-1:]:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def finished(tiny_folder, problem_file, tmp_path_factory):
    """The folder of a finished run with all that a page can show."""
    folder = tmp_path_factory.mktemp("page") / "run"
    config = OPSDCConfig.from_dict({
        "output_dir": str(folder),
        "model": {"name_or_path": str(tiny_folder)},
        "data": {"source": str(problem_file), "eval_size": 16, "gate_size": 4},
        "prompt": {"instruction": "Be brief."},
        "rollout": {"prompts_per_step": 5, "max_new_tokens": 12},
        "teacher": {"mode": "frozen"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "max_tokens_per_micro_batch": 400, "keep_best": True},
        "eval": {"every": 1, "max_new_tokens": 8, "scorer": "number", "greedy": True},
    })  # fmt: skip
    summary = OPSDCTrainer(None, config).train()
    return SimpleNamespace(folder=folder, config=config, summary=summary)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, for a test to change."""
    folder = tmp_path / "copy"
    skip = shutil.ignore_patterns("model", "checkpoints", "best")
    shutil.copytree(finished.folder, folder, ignore=skip)
    return folder


def test_a_run_leaves_its_page(finished):
    html = (finished.folder / "report.html").read_text("utf-8")
    shown, summary = Tags(html), finished.summary
    text = shown.text
    for arm in ("base", "prompt_only", "trained"):
        assert f"{summary[arm]['tokens_mean']:.1f}" in text
        assert f"{100 * summary[arm]['accuracy']:.1f} %" in text
    against_base = summary["compared_with_base"].values()
    for compared in (*against_base, summary["trained_compared_with_told"]):
        low, high = compared["accuracy_difference_ci95"]
        assert f"{100 * low:+.1f} … {100 * high:+.1f}" in text
        low, high = compared["token_reduction_ci95"]
        assert f"{100 * low:.1f} % … {100 * high:.1f} %" in text
    assert "was trained for 3 steps of 5 responses (all weights)" in text
    assert "The same problems, answered greedily" in text
    assert f"kept: step {summary['kept_step']}" in text
    assert "Be brief." in text
    assert "optim.lr 0.001" in text
    assert summary["versions"]["torch"] in text
    # Three charts, and three answers to each of eight problems.
    assert [a["aria-label"] for t, a in shown.tags if t == "svg" and "aria-label" in a] == [
        "Tokens per response over the steps",
        "Share of right answers over the steps",
        "Divergence from the teacher, nats per token over the steps",
    ]
    assert html.count('<div class="verdict"><span>trained</span>') == 8


def test_the_page_colours_the_tokens_that_were_recorded(finished):
    shown = Tags((finished.folder / "report.html").read_text("utf-8"))
    tokens = [a for tag, a in shown.tags if tag == "span" and "token s" in a.get("class", "")]
    titles = [a["title"] for a in tokens if "title" in a]
    recorded = [
        value
        for row in read_lines(finished.folder / "divergence.jsonl")
        for _, value in row["tokens"]
    ]
    assert titles == [f"{value:.3f} nats" for value in recorded]
    assert len(tokens) == len(recorded) + 9  # and the legend


def test_the_command_writes_it_anew(finished, tmp_path, capsys):
    file = tmp_path / "sent.html"
    rates = ["--cost_per_hour", "2.5", "--currency", "EUR", "--watts", "700"]
    assert main(["report", str(finished.folder), "--output", str(file), *rates]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    text = Tags(file.read_text("utf-8")).text
    assert re.search(r"\d\.\d\d EUR at 2\.50 EUR an hour", text)
    assert re.search(r"\d\.\d+ kWh at 700 W", text)
    before = (finished.folder / "report.html").read_text("utf-8")
    assert main(["report", str(finished.folder)]) == 0
    assert (finished.folder / "report.html").read_text("utf-8") == before
    assert "kWh" not in before


def test_what_is_no_run_or_too_young_is_one_line(finished, tmp_path, capsys):
    young = tmp_path / "young"
    young.mkdir()
    for folder, sentence in (
        (tmp_path, "is not the folder of a run: it has no config.yaml"),
        (young, "has no evaluations yet"),
    ):
        if folder == young:
            shutil.copy(finished.folder / "config.yaml", young)
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"opsdc report: {folder} {sentence}")
        assert error.count("\n") == 1
    run = str(finished.folder)
    for wrong in (["--watts", "-1"], ["--cost_per_hour", "nan"], ["--output", str(tmp_path)]):
        assert main(["report", run, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_goes_on_has_a_page(run):
    (run / "summary.json").unlink()
    (run / "eval" / "trained.jsonl").unlink()
    rows = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:2]) + rows[2][:20], "utf-8")
    text = Tags(write_page(run).read_text("utf-8")).text
    assert "This run has not ended" in text
    assert "was trained for 2 steps" in text
    assert "kept:" not in text
    # Before its first step.
    (run / "metrics.jsonl").write_text("")
    assert "was trained for 0 steps" in Tags(write_page(run).read_text("utf-8")).text


def test_a_run_without_problems_or_tokens_has_a_page(make_config, tmp_path):
    OPSDCTrainer(None, make_config(**{"train.steps": 1, "eval.problems": 0})).train()
    file = tmp_path / "run" / "report.html"
    assert "answered no held-out problems" in Tags(file.read_text("utf-8")).text
    (tmp_path / "run" / "divergence.jsonl").unlink()
    write_page(tmp_path / "run")
    assert "recorded no divergence of single tokens" in Tags(file.read_text("utf-8")).text


def test_few_problems_get_no_interval(make_config, tmp_path):
    OPSDCTrainer(None, make_config(**{"train.steps": 1})).train()
    text = Tags((tmp_path / "run" / "report.html").read_text("utf-8")).text
    assert text.count("too few problems for an interval") >= 6
    assert "…" not in text.split("Over the steps")[0]


def test_a_page_that_fails_is_a_line(make_config, tmp_path, monkeypatch, capsys):
    def broken():
        raise OSError("no template")

    monkeypatch.setattr(page, "_template", broken)
    settings = {"train.steps": 1, "eval.problems": 0}
    assert OPSDCTrainer(None, make_config(**settings)).train()["steps"] == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "report.html" in x]
    assert line.endswith(f"no template; later: opsdc report {tmp_path / 'run'}")


def poison(run):
    """Put hostile text wherever a page takes text from."""
    for path in (*(run / "eval").glob("*.jsonl"), run / "divergence.jsonl"):
        rows = read_lines(path)
        for row in rows:
            for key in ("text", "question", "gold", "extracted"):
                if key in row:
                    row[key] = HOSTILE
            if "tokens" in row and isinstance(row["tokens"], list):
                row["tokens"] = [[HOSTILE, value] for _, value in row["tokens"]]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    config = OPSDCConfig.load(
        run / "config.yaml", {"prompt.instruction": HOSTILE.replace("\0", "")}
    )
    write_text(run / "config.yaml", config.to_yaml())
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["versions"] = {HOSTILE: HOSTILE}
    summary["model"] = {"architecture": HOSTILE}
    write_text(run / "summary.json", json.dumps(summary))


def test_no_text_acts_on_the_page(run):
    write_page(run)
    clean = Tags((run / "report.html").read_text("utf-8"))
    poison(run)
    html = write_page(run, rates=Rates(cost_per_hour=1.0, currency=HOSTILE)).read_text("utf-8")
    shown = Tags(html)
    kinds = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in shown.tags} == kinds
    assert not kinds & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
    assert sum(tag == "style" for tag, _ in shown.tags) == 1
    for _, attributes in shown.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    # It is shown all the same, its controls spelled out.
    assert shown.text.count("console.error('ran')") > 30
    assert "⟨U+202E⟩right to left⟨U+2066⟩ ⟨U+0000⟩⟨U+001B⟩[31m" in shown.text
    assert "{{ 7*7 }}{% raw %}<!--" in shown.text
    assert not set(html) & {
        chr(i) for i in (0, 0x1B, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    }


def test_half_a_surrogate_pair_is_no_error(run):
    path = run / "eval" / "trained.jsonl"
    rows = read_lines(path)
    path.write_text("".join(json.dumps({**row, "text": "a \ud800 b"}) + "\n" for row in rows))
    assert "a ⟨U+D800⟩ b" in write_page(run).read_text("utf-8")


def test_a_long_answer_keeps_its_end(run):
    path = run / "eval" / "trained.jsonl"
    rows = [{**row, "text": "begin " + "x" * 50_000 + " Answer: 7"} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_page(run).read_text("utf-8")
    assert html.count("48,616 characters left out") == 8
    assert html.count(" Answer: 7") == 8
    assert len(html) < 150_000


def browse(html, tmp_path, *more):
    """What the browser says of a page: the loaded document, and its log."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
         "--enable-logging=stderr", "--v=0",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}",
         *more, "--dump-dom", html.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def complaints(log):
    return [line for line in log.splitlines() if "CONSOLE" in line]


def requested(tmp_path):
    """Addresses that the page asked for, by the browser's own log of the network.

    What the browser asks for by itself, such as updates, has no origin.
    """
    events = json.loads((tmp_path / "net.json").read_text("utf-8"))["events"]
    asked, own = [event.get("params", {}) for event in events], "not an origin"
    by_pages = [a for a in asked if "url" in a and a.get("initiator", own) != own]
    return sorted({a["url"] for a in by_pages if not a["url"].startswith("file:")})


@pytest.mark.whole
@pytest.mark.parametrize("hostile", [False, True])
def test_a_browser_shows_it_and_asks_for_nothing(run, tmp_path, hostile):
    if hostile:
        poison(run)
    dom, log = browse(write_page(run), tmp_path)
    shown = Tags(dom)
    assert shown.text.count("Where the teacher disagrees") == 1
    assert "Settings and versions" in shown.text
    assert complaints(log) == []
    assert requested(tmp_path) == []
    for tag, attributes in shown.tags:
        assert tag not in ("script", "img", "link", "iframe")
        outside = [v for v in attributes.values() if re.match(r"(?:https?:)?//", v or "")]
        assert outside == [], tag


@pytest.mark.whole
def test_the_browser_would_say_if_it_asked_for_something(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://evil.example/x.png'><script>console.error('ran')</script>")
    _, log = browse(bad, tmp_path)
    assert any("ran" in line for line in complaints(log))
    assert requested(tmp_path) == ["http://evil.example/x.png"]


@pytest.mark.whole
def test_the_policy_holds_back_what_would_slip_through(run, tmp_path):
    """The second lock: with markup let in on purpose, nothing runs and nothing is asked for."""
    file = write_page(run)
    html = file.read_text("utf-8")
    bad = "<img src='http://evil.example/x.png'><script>console.error('ran')</script>"
    file.write_text(html.replace("<main>", f"<main>{bad}"), "utf-8")
    _, log = browse(file, tmp_path)
    assert requested(tmp_path) == []
    assert all("Content Security Policy" in line for line in complaints(log))
    assert len(complaints(log)) == 2


def test_cost_adds_up():
    rows = [
        {
            "empty_share": 0.25, "response_tokens_mean": 10.0, "cut_share": 0.5,
            "perf/seconds_rollout": 2.0, "perf/seconds_teacher": 1.0, "perf/seconds_student": 3.0,
            "perf/seconds_optimizer": 1.0, "perf/seconds_step": 7.5,
        }
    ] * 2  # fmt: skip
    config = OPSDCConfig.from_dict({"rollout": {"prompts_per_step": 4}})
    assert tokens_of_training(rows, config) == (60, 30)
    correct = OPSDCConfig.from_dict({
        "rollout": {"prompts_per_step": 4}, "data": {"train_on": "correct"},
    })  # fmt: skip
    assert tokens_of_training(rows, correct) == (60, None)
    phases, whole = seconds_by_phase(rows, 3600.0)
    assert [spent for _, spent in phases] == [4, 2, 6, 2, 1, 3585]
    assert whole == 3600
    # A resumed run's last process was shorter than all steps together.
    assert seconds_by_phase(rows, 9.0)[1] == seconds_by_phase(rows, None)[1] == 15
    rates = Rates(cost_per_hour=2.5, currency="EUR", watts=700)
    shown = dict(cost_rows(rows, config, seconds=3600.0, evaluated=1234, rates=rates))
    assert shown["money"] == "2.50 EUR at 2.50 EUR an hour"
    assert shown["energy"] == "0.700 kWh at 700 W"
    assert shown["sampling"] == "15.0 tokens per second"
    assert shown["update"] == "3.0 tokens per second"
    assert shown["tokens sampled for evaluations"] == "1,234"
    for wrong in ({"watts": -1.0}, {"cost_per_hour": float("inf")}):
        with pytest.raises(ConfigError, match="must be a number from 0 on"):
            Rates(**wrong)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"),
     (12000, "3 h 20 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_curves_stand_where_their_values_are():
    points = [(0, 10.0), (5, None), (10, float("nan")), (20, 40.0)]
    series = [Series(name="a", look="main", points=points),
              Series(name="none", look="thin", points=[(1, None)]),
              Series(name="level", look="level", points=[(0, 20.0)])]  # fmt: skip
    chart = draw("t", series, last_step=20, kept=10, show=lambda v: f"{v:g}")
    assert [curve["name"] for curve in chart["curves"]] == ["a", "level"]
    assert [rung["text"] for rung in chart["rungs"]] == ["0", "10", "20", "30", "40"]
    assert [step["text"] for step in chart["steps"]] == ["0", "5", "10", "15", "20"]
    first, last = chart["curves"][0]["dots"]
    assert (first["x"], last["x"]) == (chart["left"], chart["right"])
    assert (first["y"], last["y"]) == (chart["rungs"][1]["y"], chart["top"])
    assert chart["kept"]["x"] == (chart["left"] + chart["right"]) / 2
    assert draw("t", series[1:2], last_step=20, kept=None, show=str) is None
    # All values 0, and a single step.
    assert draw("t", [Series(name="a", look="main", points=[(0, 0.0)])], last_step=0, kept=0,
                show=str)["rungs"]  # fmt: skip


def test_pieces_make_up_the_text():
    tokenizer = byte_tokenizer()
    ids = tokenizer("So, 7 é ×  2.\n", add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert found[-1] == ""
    # A letter of several tokens is not whole in any of them.
    whole = decode(tokenizer, ids).replace("é", "").replace("×", "")
    assert "".join(found).replace("\ufffd", "") == whole


def test_the_summary_of_a_moved_folder_is_the_same_page(run, finished):
    """The page is made of the folder alone: it may have been copied from another machine."""
    write_summary(run, finished.config, {"steps": 3, "kept_step": 3})
    text = Tags(write_page(run).read_text("utf-8")).text
    assert "16 held-out problems" in text
