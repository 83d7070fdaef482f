import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sample_run import bare, sample_result, write_run

from kdx.errors import CheckpointError, ConfigError
from kdx.figures import ROLES
from kdx.formats import count, counted, duration, milliseconds, percent, points, ratio, size, whole
from kdx.report import comparison, summary_table, write_report
from kdx.result import read_result, to_dict, write_result
from kdx.standings import label_sentences


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "all")
    assert write_report(folder) == folder / "report.html"
    return folder


def text_of(table, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def cells(markdown, heading):
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]


def has_colour(picture, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(picture - wanted).max(axis=2) <= 2).any())


def test_the_comparison_holds_the_numbers_of_the_result(run):
    result = read_result(run)
    rows = {row[0]: row[1:] for row in cells((run / "report.md").read_text(), "Comparison")}
    expected = {
        "teacher `wide`": result.teachers["wide"],
        "teacher `vit`": result.teachers["vit"],
        "ensemble `committee`": result.targets["committee"],
        "plain student": result.plain,
    }
    for name, row in expected.items():
        keys = ("accuracy", "macro_recall", "macro_f1", "calibration_error")
        assert rows[name][:5] == [whole(row.labelled), *(percent(row.test[key]) for key in keys)]
        cost = [count(row.size.parameters), count(row.size.multiply_adds), size(row.size.file_bytes)]
        assert rows[name][5:] == [*cost, milliseconds(row.size.latency_ms)]
    assert rows["distilled student"][:2] == ["600", "83.89 %"]


def test_the_gain_is_told_with_the_labels_of_both_sides(run):
    text = (run / "report.md").read_text()
    assert "+3.75 points at the best epoch (83.89 % against 80.14 %)" in text
    assert "+4.08 points at the last epoch (83.75 % against 79.67 %)" in text
    assert "one seed concludes little" in text
    assert "The student, distilled or plain, saw the labels of 600 of 54,000 training samples." in text
    assert "`wide` the labels of all 54,000 training samples, `vit` an unknown number of labels" in text
    assert "also carries labels that only the teachers saw" in text
    assert "The best epoch, 11 of 12, was chosen on the validation split. The test split was read once" in text


def test_compression_time_and_epochs_are_reported(run):
    text = (run / "report.md").read_text()
    wide = next(row for row in cells(text, "Compression") if row[0] == "teacher `wide`")
    assert wide[1:] == ["181x", "1,337x", "178x", "68.3x"]
    times = {row[0]: row[1] for row in cells(text, "Time")}
    assert (times["teachers"], times["data"], times["whole run"]) == ("1 min 21 s", "9.8 s", "2 min 32 s")
    head, accuracy = cells(text, "Best and last epoch")[0], cells(text, "Best and last epoch")[2]
    assert head[1:] == [
        f"{w} epoch ({e}), {s}" for w, e in (("best", 11), ("last", 12)) for s in ("validation", "test")
    ]
    assert accuracy[1:] == ["84.33 %", "83.89 %", "84.21 %", "83.75 %"]


def test_the_report_lists_the_files_that_exist_and_how_to_load_the_student(run):
    text = (run / "report.md").read_text()
    listed = {row[0].strip("`") for row in cells(text, "Files")[2:]}
    assert listed == {path.name for path in run.iterdir()}
    assert f'kdx.load_student("{run.parent.name}/{run.name}")' in text
    assert "wide.logits -> committee.logits" in text
    assert "kd: {use: soft_targets, temperature: 4.0}" in text
    assert ["`libraries.torch`", "2.14.1"] in cells(text, "Environment")


def test_the_page_needs_nothing_from_outside_and_no_script(run):
    page = (run / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', page))
    assert page.count("<img ") == 2
    assert "href=" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    for shown in ("83.89 %", "+3.75 points", "181x", "labels: student 600, teachers 54,000 and unknown; one seed"):
        assert shown in page


@pytest.mark.parametrize("name", ["curves.png", "confusion.png"])
def test_the_figures_are_not_blank(run, name):
    with Image.open(run / name) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels[::7, ::7].reshape(-1, 3), axis=0)) > 20
    assert (pixels < 250).any(axis=2).mean() > 0.02


def test_each_role_has_its_colour_in_the_curves(run):
    with Image.open(run / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    assert all(has_colour(pixels, colour) for colour in ROLES.values())
    assert not has_colour(pixels, "#ff00ff")


def test_a_run_without_teachers_splits_or_history_is_reported(tmp_path):
    write_result(tmp_path, bare(sample_result()))
    (tmp_path / "curves.png").write_bytes(b"of an earlier report")
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No teacher took part: this is plain supervised training." in text
    assert "There is no validation split" in text
    assert "points" not in text
    assert [row[0] for row in cells(text, "Comparison")[2:]] == ["student"]
    assert "## Compression" not in text
    assert not (tmp_path / "curves.png").exists()
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_without_a_test_split_no_test_accuracy_is_claimed(tmp_path):
    result = sample_result()
    best, last = (dataclasses.replace(point, test={}) for point in (result.best, result.last))
    write_result(tmp_path, dataclasses.replace(result, best=best, last=last, plain=None, confusion=[]))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "There is no accuracy on a test split." in text
    assert "There is no plain student to compare with" in text
    assert "read once" not in text


def test_a_teacher_that_had_more_images_than_the_student_is_said_to_have_had_them(tmp_path):
    result = dataclasses.replace(sample_result(), seen=600)
    write_result(tmp_path, result)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "saw the labels of all 600 training samples." in text
    assert "`wide` the labels of 54,000 training samples, `vit`" in text


def test_a_plain_student_with_other_labels_is_called_no_fair_comparison(tmp_path):
    result = sample_result()
    write_result(tmp_path, dataclasses.replace(result, plain=dataclasses.replace(result.plain, labelled=900)))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "The plain student saw the labels of 900 of 54,000 training samples, so the two students differ" in text


@pytest.mark.parametrize(
    ("labelled", "words"), [(54000, "also carries labels"), (None, "also may carry labels"), (600, None)]
)
def test_a_gain_is_put_down_to_labels_only_where_the_teachers_saw_more(labelled, words):
    result = sample_result()
    teachers = {"wide": dataclasses.replace(result.teachers["wide"], labelled=labelled)}
    sentences = label_sentences(dataclasses.replace(result, teachers=teachers))
    assert [words in sentence for sentence in sentences[2:]] == ([True] if words else [])


def test_names_are_shown_as_they_are(tmp_path):
    result = sample_result()
    odd = ["$x$", "_low", "<b>", "a|b", "*c*", *result.classes[5:]]
    write_result(tmp_path, dataclasses.replace(result, name="<i>run</i> | `1`", classes=odd))
    (tmp_path / "plan.txt").write_text("a ``` fence\n<script>alert()</script>\n")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<title>&lt;i&gt;run&lt;/i&gt; | `1`</title>" in page
    assert "<h1>&lt;i&gt;run&lt;/i&gt; | `1`</h1>" in page
    assert "<script" not in page
    assert "a ``` fence" in page


def test_many_classes_fit_into_the_confusion_matrix(tmp_path):
    confusion = (np.eye(200, dtype=int) * 3).tolist()
    names = [f"class {index}" for index in range(200)]
    write_result(tmp_path, dataclasses.replace(sample_result(), classes=names, confusion=confusion))
    write_report(tmp_path)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 2000


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"result\.json: there is no such file"):
        write_report(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "torn or not JSON"), ("[]", "found list, expected a mapping")])
def test_a_spoilt_environment_is_refused(tmp_path, text, message):
    write_result(tmp_path, sample_result())
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"environment\.json: {message}"):
        write_report(tmp_path)


def test_the_summary_names_everyone_and_the_labels():
    result = sample_result()
    shown = text_of(summary_table(to_dict(result)))
    assert shown == text_of(summary_table(result))
    for part in (
        "teacher wide 54,000 93.12 %",
        "ensemble committee",
        "plain student 600",
        "distilled student 600 83.89 %",
    ):
        assert part in shown
    assert "+3.75 points" in shown
    assert "600 of 54,000" in shown


def test_seeds_give_mean_deviation_and_paired_difference():
    table, data = comparison([to_dict(sample_result(seed)) for seed in (0, 1, 2)])
    assert data["seeds"] == [0, 1, 2]
    assert (data["labelled"], data["seen"], data["teachers"]) == (600, 54000, {"wide": 54000, "vit": None})
    best = data["best"]
    assert best["plain"]["values"] == pytest.approx([0.8014, 0.8004, 0.7994])
    assert best["distilled"]["mean"] == pytest.approx(0.8399)
    assert best["distilled"]["std"] == pytest.approx(0.001)
    # Plain falls and distilled rises by 0.1 points a seed, so the paired difference moves by 0.2.
    assert best["difference"]["values"] == pytest.approx([0.0375, 0.0395, 0.0415])
    assert best["difference"]["std"] == pytest.approx(0.002)
    assert data["last"]["difference"]["std"] == pytest.approx(0)
    shown = text_of(table)
    assert "best, mean 80.04 ± 0.10 % 83.99 ± 0.10 % +3.95 ± 0.20 points" in shown
    assert "600 of 54,000" in shown


def test_one_seed_has_no_deviation_and_says_so():
    table, data = comparison([sample_result()])
    assert data["best"]["difference"] == {"values": [pytest.approx(0.0375)], "mean": pytest.approx(0.0375), "std": None}
    shown = text_of(table)
    assert "one seed concludes little" in shown
    assert "best, mean 80.14 % 83.89 % +3.75 points" in shown


def test_without_a_plain_student_there_is_no_difference():
    table, data = comparison([dataclasses.replace(sample_result(seed), plain=None) for seed in (0, 1)])
    assert data["best"]["plain"] is None
    assert data["best"]["difference"] is None
    assert "best, seed 1 - 83.99 % -" in text_of(table)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "needs at least one result"),
        ([sample_result(1), sample_result(1)], "seed 1 occurs twice"),
        (
            [sample_result(0), dataclasses.replace(sample_result(1), labelled=500)],
            r"seed 1 cannot be averaged with seed 0: they differ in the number of labels \(500 against 600\)",
        ),
    ],
)
def test_results_that_do_not_belong_together_are_refused(results, message):
    with pytest.raises(ConfigError, match=message):
        comparison(results)


def test_numbers_are_written_with_their_units():
    assert [count(n) for n in (850, 61706, 11173962, 1_814_073_344)] == ["850", "61.71 k", "11.17 M", "1.814 G"]
    assert [size(n) for n in (850, 251_000, 44_781_000)] == ["850 B", "251 kB", "44.78 MB"]
    assert [duration(s) for s in (9.84, 81.2, 3725)] == ["9.8 s", "1 min 21 s", "1 h 02 min"]
    assert [milliseconds(t) for t in (0.3123, 21.31, 1234.5)] == ["0.312 ms", "21.3 ms", "1,234 ms"]
    assert [ratio(a, b) for a, b in ((2, 1), (2000, 1), (1, 0), (None, 1))] == ["2x", "2,000x", "-", "-"]
    assert [percent(None), percent(float("nan")), points(-0.0123)] == ["-", "-", "-1.23 points"]
    found = [counted(0, "sample"), counted(1, "sample"), counted(1024, "sample"), counted(2, "was", "were")]
    assert found == ["0 samples", "1 sample", "1,024 samples", "2 were"]
