"""Choice benchmarks: recorded official judgements, the published rules a second time, regressions."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_eval.scoring import mmmu, realworldqa, videomme
from qwenvl_eval.scoring.choice import by_rule, strict
from qwenvl_eval.scoring.verdict import Outcome

RECORDS = Path(__file__).resolve().parents[3] / "shared" / "eval-records"
recorded = pytest.mark.skipif(
    not RECORDS.is_dir(), reason=f"{RECORDS} with the recorded official judgements is not there"
)

COLOURS = {"A": "red car", "B": "blue car", "C": "green car", "D": "none of them"}


def choice(gold="A", options=COLOURS):
    return {"type": "multiple-choice", "answer": gold, "options": options}


def question(*golds):
    return {"type": "open", "answer": golds[0] if len(golds) == 1 else list(golds), "options": {}}


def read(protocol, answer, options=COLOURS):
    """What the protocol reads, whichever option is the right one: a letter, or why it read none."""
    verdicts = {gold: protocol(answer, choice(gold, options)) for gold in options}
    (extracted,) = {verdict.extracted for verdict in verdicts.values()}
    for gold, verdict in verdicts.items():
        assert verdict.right == (extracted == gold)
    return extracted or verdicts["A"].outcome


@pytest.fixture(scope="module")
def records():
    lines = (RECORDS / "mmmu-val-llava1.5-13b.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def target_of(record):
    if record["question_type"] == "multiple-choice":
        return choice(record["answer"], record["index2ans"])
    return question(*[record["answer"]] if isinstance(record["answer"], str) else record["answer"])


@recorded
def test_mmmu_verdicts_and_accuracies_are_the_official_ones(records):
    verdicts = [mmmu.official(record["response"], target_of(record)) for record in records]
    drawn = [i for i, verdict in enumerate(verdicts) if verdict.outcome is Outcome.UNPARSED]
    assert len(records) == 900 and len(drawn) == 2
    assert [verdicts[i].chance for i in drawn] == [0.25, 0.25]
    right = Counter()
    for i, (record, verdict) in enumerate(zip(records, verdicts, strict=True)):
        theirs = record["official"]["judge"] == "Correct"
        if i not in drawn:
            assert verdict.right == theirs, record["id"]
        right[record["subject"]] += theirs if i in drawn else verdict.right
    assert round(sum(right.values()) / 900, 3) == 0.367
    published = json.loads((RECORDS / "mmmu-val-llava1.5-13b.results.json").read_text(encoding="utf-8"))
    assert {subject: right[subject] / 30 for subject in published} == pytest.approx(
        {subject: figures["acc"] for subject, figures in published.items()}
    )


@recorded
def test_mmmu_parses_are_the_official_ones(records):
    kinds = Counter()
    for record in records:
        theirs = record["official"]["parsed_pred"]
        if record["question_type"] == "multiple-choice":
            ours = mmmu.parse_choice(record["response"], record["index2ans"])
            kinds["drawn" if ours is None else ours == theirs] += 1
        else:
            ours = mmmu.parse_open(record["response"])
            assert len(ours) == len(set(ours))
            kinds[set(ours) == set(theirs)] += 1
    assert kinds == {True: 898, "drawn": 2}


@recorded
def test_a_bare_letter_means_the_same_to_every_protocol(records):
    bare = [r for r in records if r["question_type"] == "multiple-choice" and len(r["response"]) == 1]
    assert len(bare) > 800
    for record in bare:
        target = target_of(record)
        official = mmmu.official(record["response"], target)
        for protocol in (strict, by_rule, realworldqa.letter):
            assert protocol(record["response"], target) == official, (protocol, record["id"])


def published_choice(answer, options):
    """The rule's text, step by step, without regard for tidiness."""
    for mark in [",", ".", "!", "?", ";", ":", "'"]:
        while answer.startswith(mark):
            answer = answer[1:]
        while answer.endswith(mark):
            answer = answer[:-1]
    answer = " " + answer + " "
    for shape in ["({})", " {} "]:
        last = [(m.start(), o) for o in options for m in re.finditer(re.escape(shape.format(o)), answer)]
        if last:
            return max(last)[1]
    if len(answer.split()) <= 5:
        return None
    last = [(answer.lower().rfind(text.lower()), letter) for letter, text in options.items()]
    best = max(place for place, _ in last)
    return min(letter for place, letter in last if place == best) if best >= 0 else None


WORDS = r"A B C (A) (B) (D) a b the \boxed{A} **B** . , ' : ( ) or and I not".split()
PHRASES = ["red car", "Blue Car", "answer is", "is correct", "\n"]
pieces = st.lists(st.sampled_from([*WORDS, *PHRASES]), max_size=12).flatmap(
    lambda words: st.sampled_from([" ", ""]).map(lambda gap: gap.join(words))
)


@settings(max_examples=400, deadline=None)
@given(pieces)
def test_mmmu_choices_follow_the_rule_as_written(answer):
    assert mmmu.parse_choice(answer, COLOURS) == published_choice(answer, COLOURS)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(A) no, (B)", "B"),
        ("(B) beats C though C is last C", "B"),
        ("A or B", "B"),
        (".'B'.", "B"),  # marks go once and in order, quotes last
        ("'B.'", None),
        ("B)", None),
        ("I believe that it is the blue car", "B"),
        ("the blue car, I do believe", "B"),
        ("it is the blue car", None),
        ("red car, green car, or is it the blue car", "B"),
        ("A car of some other colour is seen", "A"),
        ("", None),
    ],
)
def test_mmmu_choice_quirks(answer, letter):
    assert mmmu.parse_choice(answer, COLOURS) == letter


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("The answer is 3.14159.", {3.14}),
        ("Thus x = 5. So y = 7", {7.0}),
        ("x = 5\ny = 7", {7.0}),  # an equals sign counts in the last line only
        ("B", {" b", "b "}),
        ("about 1,234 or 5e3", {"about 1,234 or 5e3", 1234.0, 5000.0, 234.0, 3.0}),
        ("Final answer :", {"final answer :"}),
        ("The result is so large. Result 12 cm", {"12 cm", 12.0}),
        ("this 9", {9.0}),  # "is " stands in "this "
        ("It is\nIt is 4", {4.0}),
    ],
)
def test_mmmu_open_parses(answer, parsed):
    assert set(mmmu.parse_open(answer)) == parsed


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123459.,-+eE ax", max_size=24))
def test_mmmu_numbers_are_those_of_the_published_patterns(text):
    published = (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
    assert [pattern.findall(text) for pattern in mmmu._NUMBERS] == [re.findall(p, text) for p in published]


def test_mmmu_open_matches_by_substring_and_by_number():
    assert mmmu.official("It could be transformation", question("Transformation")).right
    assert mmmu.official("untransformation", question("Transformation")).right
    assert not mmmu.official("trans", question("Transformation")).right
    assert mmmu.official("the result is 0.333", question("1/3", "0.334")).right
    assert not mmmu.official("0.34", question("1/3", "0.334")).right
    assert mmmu.official("Step b", question("B")).right and not mmmu.official("Stab", question("B")).right
    assert mmmu.official(" . ", question("B")).outcome is Outcome.UNPARSED
    assert mmmu.official("$1,000", question("1000")).right


def published_letter(answer, prefixes):
    answer = answer.strip()
    for prefix in prefixes:
        answer = answer.replace(prefix, "")
    if len(answer.split()) > 10 and not any(letter in answer for letter in "ABCD"):
        return ""
    return next((c for c in answer if c in "ABCD"), "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*videomme._PREFIXES, "C", "d", "Based", "on", "it", ":", "E"]), max_size=14))
def test_the_ten_words_of_videomme_decide_nothing(words):
    answer = " ".join(words)
    assert videomme.parse(answer) == published_letter(answer, videomme._PREFIXES)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("The answer is C.", "C"),
        ("Answer: C", "C"),
        ("Option: D", "D"),
        ("Based on the video, the answer is C", "B"),
        ("Best answer: C", "B"),  # two commas are missing: neither prefix is removed
        ("Best option: C", "B"),
        ("The best option is C", "C"),
        ("Best answer:Best option: C", "C"),
        ("c", ""),
        ("it shows a man who walks along the road to a far away house", ""),
    ],
)
def test_videomme_quirks(answer, letter):
    verdict = videomme.official(answer, {"answer": "C", "options": COLOURS})
    assert verdict.extracted == letter == videomme.parse(answer)
    assert verdict.chance == 0
    assert verdict.outcome is (
        Outcome.RIGHT if letter == "C" else Outcome.WRONG if letter else Outcome.UNPARSED
    )


STRICT = [
    ("B", "B"),
    ("B.", "B"),
    ("b", "B"),
    ("a.", "A"),
    ("a\nb", Outcome.UNPARSED),
    ("e", Outcome.UNPARSED),
    ("(B)", "B"),
    ("**B**", "B"),
    ("**B.** blue car", "B"),
    ("B) blue car", "B"),
    ("B: the blue one", "B"),
    (r"\boxed{B}", "B"),
    (r"So we get $\boxed{\text{(B) blue}}$.", "B"),
    (r"The final answer is $\boxed{\mathrm{B}}$", "B"),
    (r"\boxed{blue car}", "B"),
    ("The answer is A because it is red", "A"),
    ("The answer is A, B is wrong", "A"),
    ("The correct answer to the question is option (C).", "C"),
    ("**Answer:** C", "C"),
    ("### Final Answer\n\nC", "C"),
    ("answer: c", "C"),
    ("The answer is the blue car.", "B"),
    ("The answer is blue car. It is easy to see", "B"),
    ("The answer is (A). No: the answer is (D)", "D"),
    ("The answer is D. This answer is consistent with the picture.", "D"),
    ("The answer is D. The answer is not hard to find, and it is (B) that is red", "D"),
    (r"The answer is A." + "\n" + r"Checking again: \boxed{C}", "C"),
    ("(A) looks right, but the answer is B", "B"),
    ("Option B is correct, option A is wrong.", "B"),
    ("B is the correct answer", "B"),
    ("I would go with (C).", "C"),
    ("I choose option D", "D"),
    ("Therefore, B.", "B"),
    ("<answer>B</answer>", "B"),
    ("答案是B。", "B"),
    ("故选：C", "C"),
    ("the red car", Outcome.UNPARSED),
    ("red car", "A"),
    ("Red car.", "A"),
    ("B\n\n(A) is red and far away", "B"),
    ("It is near the road (B), as one sees", "B"),
    ("Vitamin C deficiency", Outcome.UNPARSED),
    ("Vitamin C", Outcome.UNPARSED),
    ("A dog runs", Outcome.UNPARSED),
    ("A", "A"),
    ("", Outcome.UNPARSED),
    ("E", Outcome.UNPARSED),
    ("The answer is E", Outcome.UNPARSED),
    ("The answer is A. Or rather, the answer is E", Outcome.UNPARSED),
    ("The answer is A or B", Outcome.UNPARSED),
    ("Answer: A, C", Outcome.UNPARSED),
    ("Answer: A/C", Outcome.UNPARSED),
    (r"\boxed{A, B}", Outcome.UNPARSED),
    ("A\nB", Outcome.UNPARSED),
    ("A. red car\nB. blue car\nC. green car", Outcome.UNPARSED),
    ("A. red car B. blue car C. green car", Outcome.UNPARSED),
    ("(A) and (B)", Outcome.UNPARSED),
    ("The answer is not A", Outcome.UNPARSED),
    ("The answer could be A", Outcome.UNPARSED),
    ("Neither A nor B is correct.", Outcome.UNPARSED),
    ("Options:\nA. red car\nB. blue car", Outcome.UNPARSED),
    ("The answer is I think unclear", Outcome.UNPARSED),
    ("Sorry, I cannot help with that.", Outcome.UNPARSED),
    ("The answer is a red car", "A"),
    ("U.S. A. B", Outcome.UNPARSED),
]


@pytest.mark.parametrize(("answer", "letter"), STRICT)
def test_strict_reads_declared_answers_and_nothing_else(answer, letter):
    assert read(strict, answer) == letter
    assert strict(answer, choice()).chance == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("**B**", "B"),
        ("The answer is B because it is blue", "B"),
        ("I would say C", "C"),
        ("C the green one", "C"),
        ("A", "A"),
        ("The answer is A because it is red", Outcome.UNPARSED),
        ("The answer is A because it is the red car", "A"),
        ("(A) looks right, but the answer is B", Outcome.UNPARSED),
        ("It must be the red car", "A"),
        ("It must be the red cart", Outcome.UNPARSED),
        ("either the red car or the blue car", Outcome.UNPARSED),
        ("Vitamin C deficiency", Outcome.UNPARSED),
        ("Vitamin C", Outcome.UNPARSED),
        ("Vitamin C deficiency, hence C", "C"),
        ("C (vitamin C)", "C"),
        ("B, not A", Outcome.UNPARSED),
        ("E", Outcome.UNPARSED),
        ("", Outcome.UNPARSED),
        ("Sorry, I can't help with B", Outcome.REFUSED),
        ("I'm unable to see any image, so B", Outcome.REFUSED),
        ("I cannot determine the answer without the image", Outcome.REFUSED),
    ],
)
def test_the_rule_of_the_judge_protocol(answer, letter):
    assert read(by_rule, answer) == letter
    verdict = by_rule(answer, choice())
    assert verdict.chance == (0.2 if letter is Outcome.UNPARSED else 0)
    assert realworldqa.rule(answer, choice()) == verdict


def test_an_option_that_sounds_like_a_refusal_is_an_answer():
    options = {"A": "yes", "B": "one cannot determine the answer"}
    assert read(by_rule, "One cannot determine the answer.", options) == "B"
    assert read(strict, "One cannot determine the answer.", options) == "B"


def test_an_option_named_after_a_letter_is_read_by_its_text_only_where_the_letter_is_not_declared():
    options = {"A": "Project B", "B": "Project A"}
    assert read(by_rule, "Project B", options) == "A"
    assert read(strict, "Project B", options) == "A"
    assert read(strict, "The answer is B", options) == "B"


def test_open_questions_are_compared_as_wholes():
    for protocol in (strict, by_rule):
        for answer in ("Tampa", "tampa.", "The answer is Tampa.", r"\boxed{\text{Tampa}}", "Florida"):
            assert protocol(answer, question("Tampa", "Florida")).right, answer
        assert protocol("$1,200.50", question("1200.5")).right
        assert not protocol("12", question("2")).right
        assert not protocol("not Tampa", question("Tampa")).right
        assert protocol("", question("Tampa")).outcome is Outcome.UNPARSED
    assert strict("The answer is 3. No, the answer is 4", question("4")).right
    assert strict("The answer is 4. This answer is the shortest", question("4")).right
    assert strict("12", question("2")).outcome is Outcome.WRONG
    assert by_rule("12", question("2")).outcome is Outcome.UNPARSED


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(B) whatever", "B"),
        ("B) whatever", "B"),
        ("Blue car.", "B"),
        ("A red car", Outcome.UNPARSED),
        ("It is B", Outcome.UNPARSED),
        ("E", Outcome.UNPARSED),
        ("", Outcome.UNPARSED),
    ],
)
def test_the_letter_protocol_of_realworldqa(answer, letter):
    assert read(realworldqa.letter, answer) == letter


def test_the_letter_protocol_compares_texts_without_case_white_space_and_final_stops():
    assert realworldqa.letter(" Two. ", question("two")).right
    assert realworldqa.letter("2", question("two")).outcome is Outcome.WRONG
    assert realworldqa.letter("twofold", question("two")).outcome is Outcome.WRONG
    assert realworldqa.letter(" .", question("two")).outcome is Outcome.UNPARSED


PROTOCOLS = (mmmu.official, strict, by_rule, videomme.official, realworldqa.letter)


@settings(max_examples=300, deadline=None)
@given(st.one_of(pieces, st.text()), st.sampled_from("ABCD"))
def test_every_protocol_is_repeatable_and_says_what_it_read(answer, gold):
    for protocol in PROTOCOLS:
        verdict = protocol(answer, choice(gold))
        assert verdict == protocol(answer, choice(gold))
        assert verdict.right == (verdict.extracted == gold)
        if verdict.outcome in (Outcome.UNPARSED, Outcome.REFUSED):
            assert verdict.extracted == ""
        else:
            assert verdict.extracted in COLOURS and verdict.chance == 0


@settings(max_examples=200, deadline=None)
@given(pieces, st.sampled_from("ABCD"))
def test_a_last_declared_answer_decides_whatever_came_before(before, letter):
    for said in (f"The final answer is {letter}.", rf"\boxed{{{letter}}}", f"Answer: ({letter})"):
        assert read(strict, f"{before}\n{said}") == letter


@settings(max_examples=200, deadline=None)
@given(pieces)
def test_strict_does_not_depend_on_which_letters_the_options_have(answer):
    """Other letters, the same texts: what was read moves along."""
    moved = dict(zip("ABCD", "BCDA", strict=True))
    options = {moved[letter]: text for letter, text in COLOURS.items()}
    turned = re.sub(r"(?<![A-Za-z])[ABCD](?![A-Za-z])", lambda match: moved[match[0]], answer)
    if re.search(r"[A-D][a-zI]|[a-zI][A-D]|(?<![a-z])[abcd](?![a-z])|\bI\b", answer):
        return  # fused words and small letters would mean something else
    ours = read(strict, answer)
    assert read(strict, turned, options) == moved.get(ours, ours)


@pytest.mark.parametrize(
    "unit", r"answer_is_ \boxed{ \boxed{{} (A A,_ B_is_ / _/ the/ ** 1 ,111 answer/".split()
)
def test_a_long_answer_takes_no_long_time(unit):
    unit = unit.replace("_", " ").replace("/", "\n")
    answer = unit * (60_000 // len(unit)) + "a"
    began = time.process_time()
    for protocol in PROTOCOLS:
        protocol(answer, choice())
        protocol(answer, question("blue"))
    assert time.process_time() - began < 5


def test_importing_the_protocols_loads_no_model_library():
    code = (
        "import sys; from qwenvl_eval.scoring import choice, mmmu, realworldqa, videomme; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
