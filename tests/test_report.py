"""The report of a study: what stands on the page is checked against numbers worked out here from the same results."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from made_up_study import COMPONENTS, GROUPS, entry, odd, study
from matplotlib.image import imread

from jaxmech.report import write_report
from jaxmech.report.words import percent_interval, signed

STAGES = {
    "accuracy": "Accuracy",
    "discovery": "Circuits",
    "minimality": "Minimality",
    "faithfulness": "Faithfulness",
    "overlap": "Overlap of the circuits",
    "completeness": "Completeness",
    "dcm": "What the groups carry (DCM)",
    "activation_patching": "Activation patching",
    "cmap": "Cross-model activation patching (CMAP)",
    "knockout": "Attention knockout",
}
META = {
    "settings": {"base": "/models/base", "tuned": ["/models/tuned"], "k": {}, "data": None, "seed": 0,
                 "stages": [{"group": "value_fetcher", "k": 4}, {"group": "object_lookup", "k": 2}]},
    "versions": {"jaxmech": "0.1.0", "jax": "0.10.2"},
    "timings": {"accuracy": {"base": 0.71, "tuned": 0.62}, "discovery": {"base": 12.345, "tuned": 11.5}},
}  # fmt: skip


class Page(HTMLParser):
    """What a reader gets of a page: its text, images, links, and whether every element is closed."""

    EMPTY = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.images, self.ids, self.links, self.loaded, self.wrong = [], [], [], [], [], []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.wrong += self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))  # with ordinary spaces

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.wrong += ["script"] if tag in ("script", "iframe", "object", "embed", "link") else []

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a whole study's report."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(folder, study(), **META) == folder / "report.html"
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are not drawn, which takes most of the time; the paths where they would be."""
    paths = []

    def drawn(path, picture):
        paths.append(path)
        return {"picture": picture, "source": "", "width": 1, "height": 1}

    monkeypatch.setattr("jaxmech.report.html._drawn", drawn)
    return paths


def read(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def test_the_page_is_well_formed_and_has_every_section(report):
    page = read(report)
    assert not page.wrong and len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    for title in (*STAGES.values(), "Table of heads", "Settings, versions, timings"):
        assert page.text.count(title) >= 2, title  # a heading and a line of the contents
    assert "Not run" not in page.text
    assert "25.2 s in all" in page.text and "0.10.2" in page.text and "/models/tuned" in page.text
    assert study()["example"] in page.text


def test_the_page_needs_nothing_from_elsewhere(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.loaded)
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert "http" not in without_images and "url(" not in without_images and "@import" not in without_images
    for image in page.images:
        root = ElementTree.fromstring(base64.b64decode(image["src"].partition(",")[2]))
        for element in root.iter():
            hrefs = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(href.startswith(("#", "data:image/png")) for href in hrefs)


def test_the_headline_is_computed_from_the_results(report):
    results, page = study(), read(report)
    before, after = (results["accuracy"][model]["accuracy"] for model in ("base", "tuned"))
    by_component = results["cmap"]["tuned"]["groups"]
    group = max((g for g in GROUPS), key=lambda g: by_component["z"][g]["accuracy"])
    best = by_component["z"][group]["accuracy"]
    assert all(best > by_component[c][g]["accuracy"] for c in COMPONENTS[1:] for g in GROUPS)
    share = round(100 * (best - before) / (after - before))
    assert f"tuned answers {percent(after)} of the 350 prompts right, base {percent(before)}" in page.text
    assert f"a gain of {100 * (after - before):.1f} points" in page.text
    expected = (
        f"Patching {group} of tuned into base (z) raises {percent(before)} to {percent(best)}, {share} % of the gain"
    )
    assert expected in page.text


def test_the_tables_hold_the_numbers_of_the_results(report):
    results, page = study(), read(report)
    for found in results["cmap"]["tuned"]["groups"].values():
        for e in found.values():
            assert f"{percent(e['accuracy'])} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" in page.text
    assert percent(results["faithfulness"]["base"]["tuned"]["circuit"]["accuracy"]) in page.text
    for runs in results["dcm"]["tuned"].values():
        assert all(percent(run["test"]) in page.text for run in runs.values())
    layer, head = results["discovery"]["base"]["groups"]["object_lookup"][0]
    sweep = results["cmap"]["tuned"]["heads"]["query_box"]
    single = sweep["accuracy"][layer][head] - sweep["unpatched"]
    row = next(line for line in _rows(report) if line[:3] == ["object_lookup", "query_box", f"{layer}.{head}"])
    score = results["discovery"]["base"]["heads"]["object_lookup"][0]
    assert row[3] == f"{100 * score['score']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]".replace(
        "-", "−"
    )
    kept = results["minimality"]["base"]["groups"]["object_lookup"][0]["kept"]
    assert row[4] == ("yes" if kept else "no") and row[-1] == signed(single)


def _rows(folder) -> list[list[str]]:
    """The cells of all tables' lines."""
    text = (folder / "report.html").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", text)]


def test_every_figure_is_there_as_png_and_svg_and_has_a_description(report):
    page = read(report)
    files = {path.stem for path in (report / "figures").iterdir()}
    assert len(files) == len(page.images) == 35
    for stem in files:
        assert {path.suffix for path in (report / "figures").glob(f"{stem}.*")} == {".png", ".svg"}
        picture = imread(report / "figures" / f"{stem}.png")
        assert picture.shape[1] == 768 and picture[..., :3].std() > 0.02
    inline = {base64.b64decode(image["src"].partition(",")[2]) for image in page.images}
    assert inline == {path.read_bytes() for path in (report / "figures").glob("*.svg")}
    assert all(len(image["alt"]) > 40 and image["width"] == "461" for image in page.images)


def test_equal_results_give_equal_bytes(report, tmp_path):
    write_report(tmp_path, study(), **META)
    files = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert len(files) == 71 and files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for file in files:
        assert (report / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("missing", STAGES)
def test_a_section_whose_stage_is_missing_says_so(tmp_path, undrawn, missing):
    results = study()
    del results[missing]
    write_report(tmp_path, results, **META)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.wrong
    for section in re.findall(r"<section.*?</section>", text, flags=re.DOTALL):
        title = re.search(r"<h2>(.*?)</h2>", section)
        gone = {STAGES[missing]} | ({"Table of heads"} if missing == "discovery" else set())
        assert title and ("Not run." in section) == (title[1] in gone), title
    assert page.text.count("(not run)") == len(gone)


def test_a_study_of_which_nothing_was_run_has_a_page(tmp_path):
    write_report(tmp_path, {"models": ["base", "tuned"]}, settings={}, versions={}, timings={})
    page = read(tmp_path)
    assert page.text.count("Not run.") == len(STAGES) + 1 and not page.images


def test_results_without_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name no models, only .'prompts'."):
        write_report(tmp_path, {"prompts": 3}, **META)


def test_names_are_escaped_and_odd_results_are_shown(tmp_path):
    results = odd()
    write_report(tmp_path, results, **META)
    page = read(tmp_path)
    assert not page.wrong and "b" not in page.open
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;tuned&lt;/b&gt; &amp; $x_1$" in text
    assert results["models"][1] in page.text  # as it was written
    assert "Stage 'label_matcher' found no head" in page.text
    first = results["minimality"]["base"]["groups"]["value_fetcher"][0]["head"]
    alt = next(image["alt"] for image in page.images if image["alt"].startswith("Bars of the scores"))
    assert f"{first[0]}.{first[1]} infinite" in alt
    names = [path.name for path in (tmp_path / "figures").iterdir()]
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]+", name) for name in names)


def test_a_model_without_a_circuit_is_shown(tmp_path):
    """What a study gives if its first sweep finds nothing."""
    nothing = [[0.0] * 8] * 4
    results = study()
    for model in results["models"]:
        found = {"groups": {}, "roles": {}, "stopped": "Nothing.", "means": {"value_fetcher": nothing}, "heads": {}}
        results["discovery"][model] = found
        results["minimality"][model] |= {"groups": {}, "circuit": {}}
        results["completeness"][model] = results["completeness"][model][:1]
        results["dcm"][model] = results["activation_patching"][model] = {}
    results["overlap"] = {"tuned": {}}
    results["cmap"]["tuned"] = {"groups": {component: {} for component in COMPONENTS}, "heads": {}}
    write_report(tmp_path, results, **META)
    page = read(tmp_path)
    assert not page.wrong and "base: 0 of 0 heads stay." in page.text and "no head chosen" in page.text
    assert page.text.count("Not run, because no head is left in any circuit.") == 4  # overlap and what follows DCM
    assert "There is no head to take away." in page.text


def test_models_whose_names_differ_in_odd_characters_have_figures_of_their_own(tmp_path, undrawn):
    write_report(tmp_path, study(models=("a/B", "a:b", "a?b")), **META)
    assert len({path.name.lower() for path in undrawn if path.name.startswith("knockout-")}) == 3
    assert all(path.parent == tmp_path / "figures" for path in undrawn)


@pytest.mark.parametrize("gain", [0.0, -0.1])
def test_without_a_gain_no_share_is_named(tmp_path, undrawn, gain):
    results = study()
    before = results["accuracy"]["base"]["accuracy"]
    results["accuracy"]["tuned"] = entry(before + gain)
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text
    assert "of the gain" not in text and ("a loss of 10.0 points" if gain else "a difference of 0.0 points") in text


def test_the_headline_does_not_claim_what_the_intervals_do_not_hold(tmp_path, undrawn):
    results = study()
    before = results["accuracy"]["base"]["accuracy"]
    groups = {group: entry(before + change) for group, change in zip(GROUPS, (0.01, -0.1, 0, -0.2), strict=True)}
    results["cmap"]["tuned"]["groups"] = {"z": {**groups, "whole circuit": entry(before - 0.1)}}
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text
    assert (
        f"raises {percent(before)} to {percent(before + 0.01)}, 3 % of the gain; the interval of this includes" in text
    )
    assert f"The whole circuit (z): {percent(before - 0.1)}, no more than base alone." in text
    results["cmap"]["tuned"]["groups"] = {"z": {group: entry(before - 0.1) for group in GROUPS}}
    write_report(tmp_path, results, **META)
    assert "No single group of tuned, patched into base, raises its accuracy." in read(tmp_path).text


def test_a_head_that_went_to_a_later_group_is_named_where_it_was(tmp_path, undrawn):
    results = study()
    layer, head = results["discovery"]["base"]["groups"]["label_matcher"][0]
    assert results["discovery"]["base"]["moved"] == {"object_lookup": [{"head": [layer, head], "to": "label_matcher"}]}
    write_report(tmp_path, results, **META)
    page = read(tmp_path)
    sentence = f"Head {layer}.{head} (−96.3 %) went to label_matcher."
    assert page.text.count(sentence) >= 1
    alts = [image["alt"].replace("\N{NO-BREAK SPACE}", " ") for image in page.images]
    assert sum(sentence in alt for alt in alts) >= 1
    assert all("went to" not in alt for alt in alts if "went to label_matcher" not in alt)


def test_accuracies_of_masks_stand_beside_those_without_a_patch(report):
    header = next(row for row in _rows(report) if "unpatched" in row)
    row = next(row for row in _rows(report) if len(row) == len(header) and row[:2] == ["value_fetcher", "positional"])
    columns = [i for i, name in enumerate(header) if name == "unpatched"]
    assert len(columns) == 2 and all(row[i] == "3.1 %" for i in columns)
    grids = [image["alt"].replace("\N{NO-BREAK SPACE}", " ") for image in read(report).images]
    grids = [alt for alt in grids if alt.startswith("Grid.")]
    assert all("3.1 % unpatched" in alt and "1 heads" not in alt for alt in grids)
    assert "; object_lookup: positional" in grids[0], "groups apart"


def test_what_is_not_all_or_nothing_does_not_read_so(tmp_path, undrawn):
    results = study()
    results["accuracy"]["tuned"] = {"accuracy": 1.0, "value": 1.0, "low": 0.9891, "high": 1.0}
    results["accuracy"]["base"] = {"accuracy": 0.9997, "value": 0.9997, "low": 0.99951, "high": 0.99982}
    results["faithfulness"]["base"]["base"]["random"] = [0.024, 0.0241]
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text.replace("\N{NO-BREAK SPACE}", " ")
    alt = next(image["alt"] for image in read(tmp_path).images if image["alt"].startswith("Bars of accuracy"))
    assert "tuned 100.0 % [98.9, 100.0]" in alt.replace("\N{NO-BREAK SPACE}", " ")
    assert "base 99.97 % [99.95, 99.98]" in alt.replace("\N{NO-BREAK SPACE}", " ")
    assert "2.4 to 2.4" not in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.5, 0.6, "[50.0, 60.0]"), (0.99996, 1.0, "[99.996, 100.000]"), (1.0, 1.0, "[100.0, 100.0]"),
     (0.0, 0.0002, "[0.00, 0.02]"), (-0.2, -0.1, "[−20.0, −10.0]")],
)  # fmt: skip
def test_intervals_are_seen_to_be_some(low, high, words):
    assert percent_interval(low, high) == words


def test_the_largest_gap_is_that_of_heads_that_were_taken_away(tmp_path, undrawn):
    results = study()
    nothing = {"name": "nothing", "kind": "nothing", "size": 0, "circuit": 0.1, "model": 0.6, "gap": 0.5}
    group = {"name": "value_fetcher", "kind": "group", "size": 4, "circuit": 0.1, "model": 0.3, "gap": 0.2}
    sets = [nothing, group]
    results["completeness"]["base"] = sets
    results["completeness"]["tuned"] = [{**one, "circuit": 0.0, "model": 0.0, "gap": 0.0} for one in sets]
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text
    assert "base. The largest gap is 20.0 points, for K: value_fetcher; with nothing taken away it is 50.0." in text
    assert "tuned. Nothing is answered right, with heads taken away or without" in text


def test_heads_that_matter_at_other_tokens_are_pointed_out(tmp_path, undrawn):
    results = study()
    whole = results["accuracy"]["tuned"]["accuracy"]
    for model in results["models"]:
        results["completeness"][model][0]["model"] = results["accuracy"][model]["accuracy"] - 0.05
    results["completeness"]["tuned"][0]["model"] = 0.129
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text
    assert f"none elsewhere, tuned answers 12.9 % right; left alone, {100 * whole:.1f} %. Heads at other" in text
    assert "none elsewhere, base" not in text


def test_a_model_that_cannot_do_the_task_is_warned_of(tmp_path, undrawn):
    results = study()
    results["accuracy"]["base"] = {"accuracy": 0.0, "value": 0.0, "low": 0.0, "high": 0.011}
    for stage in ("dcm", "activation_patching"):
        results[stage]["base"] = {}
    write_report(tmp_path, results, **META)
    text = read(tmp_path).text
    assert "Warning. base answers no prompt right; naming any object of the scene would be right for 14.3 %." in text
    assert text.count("base: not run, because no head is left in its circuit.") == 2
    assert "tuned answers only" not in text


def test_the_name_of_a_table_is_its_caption_once(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    labels = re.findall(r'role="region" aria-labelledby="(table-\d+)"', text)
    assert labels == [f"table-{i + 1}" for i in range(len(labels))] and len(labels) >= 8
    assert all(text.count(f'id="{label}"') == 1 for label in labels) and "aria-label=" not in text


def test_a_large_model_is_drawn_with_one_cell_per_head(tmp_path):
    full = study(layers=32, heads=32, k=(20, 5, 10, 5))
    write_report(tmp_path, {name: full[name] for name in ("models", "discovery", "knockout")}, **META)
    for path in (tmp_path / "figures").glob("circuit-*.svg"):
        root = ElementTree.fromstring(path.read_bytes())
        images = [e for e in root.iter() if e.tag.endswith("image")]
        assert images and any(_size(image) == (32, 32) for image in images)


def _size(image) -> tuple[int, int]:
    href = next(value for name, value in image.attrib.items() if name.endswith("href"))
    return imread(io.BytesIO(base64.b64decode(href.partition(",")[2]))).shape[:2]
