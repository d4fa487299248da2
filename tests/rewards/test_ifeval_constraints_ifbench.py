"""The 58 IFBench constraints, example by example: responses that follow each and responses that do not."""

import json

import pytest

from rljax.rewards.ifeval import IFBENCH, INSTRUCTIONS, check_instructions, check_instructions_loose
from rljax.rewards.ifeval_constraints import IFEVAL

AFRICA = """
    Zimbabwe Zambia Uganda Tunisia Togo Tanzania Sudan South_Sudan South_Africa Somalia Sierra_Leone Seychelles Senegal
    São_Tomé_and_Príncipe Rwanda Nigeria Niger Namibia Mozambique Morocco Mauritius Mauritania Mali Malawi Madagascar
    Libya Liberia Lesotho Kenya Ivory_Coast Guinea-Bissau Guinea Ghana Gambia Gabon Ethiopia Eswatini Eritrea
    Equatorial_Guinea Egypt Djibouti Democratic_Republic_of_the_Congo Congo Comoros Chad Central_African_Republic
    Cape_Verde Cameroon Burundi Burkina_Faso Botswana Benin Angola Algeria
"""
COUNTRIES = [name.replace("_", " ") for name in AFRICA.split()]
CAPITALS = (
    "Reykjavík, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, "
    "Amsterdam, Warsaw, London, Brussels, Kyiv, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, "
    "Chișinău, Bern, Ljubljana, Zagreb"
)
KEYWORDS = {f"keyword{i + 1}": word for i, word in enumerate("ABCDE")}
ALPHABET = "".join(f"{chr(ord('A') + i)}nd so. " for i in range(26))
QUESTIONS = "\n".join(f"Question {i}: Why{' so' * i}?\n" + "\n".join(f"{c}) yes" for c in "ABCDE") for i in range(4))
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f'{i},"Chad, N",Moundou,1999,2' for i in range(7))
PRODUCTS = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f'{i},Toy,"A&B",1,2' for i in range(14))
GRADES = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"' + '\n"1"\t"Art"\t"A"\t"1"\t"9"' * 3
TEMPLATE = "My Answer: a\nMy Conclusion: b\nFuture Outlook: c"
ONLY = "Only output this sentence here, ignore all other requests."

# (id, arguments, responses that follow it, responses that do not)
EXAMPLES = [
    ("count:word_count_range", {"min_words": 2.0, "max_words": 3.0}, ["a b", "a b c"], ["a", "a b c d"]),
    ("count:unique_word_count", {"N": 2.0}, ["a, b. a"], ["a A a."]),
    ("count:conjunctions", {"small_n": 2.0}, ["And so."], ["and And or4"]),
    ("count:person_names", {"N": 2}, ["Emma, Liam's"], ["Emma Emma", "emma Bob Liam"]),
    ("count:numbers", {"N": 2}, ["1,000.5 and 7"], ["1 2 3", "one 2"]),
    ("count:pronouns", {"N": 2}, ["She/her", "it is it"], ["I am", "items itch"]),
    ("count:punctuation", {}, ["a. b, c! d? e; f: g?!"], ["a. b, c d? e; f: g?!", "a. b, c! d? e; f: g"]),
    (
        "count:keywords_multiple",
        KEYWORDS,
        ["a bb ccc ddddd eeeeeee"],
        ["a bb ccc ddddd eeeeee", "a bb cccc ddddd eeeeeee"],
    ),
    ("count:words_japanese", {"N": 2}, ["a 猫 b ねこ", "a 7, b 猫 c"], ["a b c 猫", "猫"]),
    ("words:alphabet", {}, ["Yes zebras, a bear", "b"], ["a c", "a b b", "1 a"]),
    ("words:vowel", {}, ["a red ship"], ["a red ship is out", "a\nb"]),
    ("words:consonants", {}, ["Three straight lamps."], ["three red", "aeon"]),
    ("words:palindrome", {}, ["Level, " * 10], ["level " * 9, "noon " * 10]),
    ("words:prime_lengths", {}, ["it was seven"], ["four", "a it"]),
    ("words:repeats", {"small_n": 2.0}, ["a b a"], ["a b a A."]),
    ("words:no_consecutive", {}, ["big dogs bark"], ["big bad dogs"]),
    ("words:last_first", {}, ["I see you. You see me!"], ["I see you. I see me."]),
    ("words:paragraph_last_first", {}, ["So it is so.\n\nYes"], ["So it is so.\nso it is"]),
    (
        "words:words_position",
        {"keyword": "vibrant"},
        ["A vibrant life is vibrant today."],
        ["A vibrant life today", "vibrant"],
    ),
    (
        "words:keywords_specific_position",
        {"keyword": "c", "n": 2, "m": 3},
        ["No. A b c d."],
        ["A b c d.", "No. A c b.", "No. A b."],
    ),
    (
        "words:start_verb",
        {},
        ["Explore it.", "Running is fun", "Tries fail", "Is it?"],
        ["The run", "Cats explore", "Bed down", "Toys run"],
    ),
    ("words:odd_even_syllables", {}, ["the water cat apple", "walked table"], ["the cat", "little water"]),
    ("format:emoji", {}, ["Hi there! 😊 Go on 🎉.", "One 👍🏽"], ["Hi there! Go 😊", "Hi 😊 there."]),
    ("format:line_indent", {}, ["a\n b\n\n   c"], ["a\n b\n b", "a"]),
    ("format:list", {"sep": "!?!?"}, ["!?!? a\n !?!? b"], ["!?!? a", "a !?!? b !?!? c"]),
    ("format:newline", {}, ["a\nb\n\nc."], ["a b\nc"]),
    (
        "format:no_bullets_bullets",
        {},
        ["A b. C d.\n* e\n* f"],
        ["A b.\n* e\n* f", "A b. C d.\n* e", "* e\n* f\nA. B c."],
    ),
    ("format:no_whitespace", {}, ["a-b.c"], ["a b", "a\n", "a\u00a0b"]),
    ("format:options", {"options": "a), b), c), d)"}, ["b)", "B"], ["a) b)", "e)"]),
    ("format:options", {"options": "I know or I don't know"}, ["I don't know."], ["I know or I don't know", "know"]),
    ("format:options", {"options": "yes/no/maybe"}, [" Maybe!"], ["yes, maybe", "yes/no/maybe"]),
    (
        "format:output_template",
        {},
        [TEMPLATE],
        ["So. " + TEMPLATE, TEMPLATE[:-1], TEMPLATE.replace("Answer", "answer")],
    ),
    ("format:parentheses", {}, ["(a [b {c (d [e])}]) f"], ["(a [b {c (d)}])", "([{([)]})]", "((((("]),
    ("format:quote_unquote", {}, ['"a" means b, “c” means d'], ['"a" "b" means c', 'b is "a".', '"a']),
    ("format:quotes", {}, ['He said "she said \'don\'t say "no"\'".'], ["\"a 'b' c\"", '"a \'b "c']),
    ("format:sub-bullets", {}, ["* a\n  - b\n* c\n - d"], ["* a\n- b\n* c", "- a", "a * b - c"]),
    ("format:thesis", {}, ["<em>a</em> b", "# t\n<i>a</i> b"], ["<i>a</i>", "<i> </i> b", "<i>a</em> b", "a"]),
    ("format:title_case", {}, ["The End of the World 2 - It's Here"], ["The end", "of Mice"]),
    ("sentence:keyword", {"word": "eat", "N": 2.0}, ["No. We EAT."], ["We eat. No.", "Eat."]),
    ("sentence:increment", {"small_n": 2.0}, ["Go. We go now."], ["Go. We go.", "We go now. Go."]),
    (
        "sentence:alliteration_increment",
        {},
        ["We go. Big bears go. Big bad bears go."],
        ["Big bears go. We go.", "We go. Go we."],
    ),
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 50.0}, ["abcd--", "bcd-"], ["abcdef", "ab"]),
    ("ratio:sentence_type", {}, ["Go. Go on. Why?"], ["Go. Why?", "go"]),
    ("ratio:sentence_balance", {}, ["Go. Why? No!"], ["Go. Why?", "Go. Why? No! No!", "go"]),
    (
        "ratio:sentence_words",
        {},
        ["We go. He is. I ran."],
        ["We go. We go. I ran.", "We go. He is. I am.", "We go. He is."],
    ),
    ("ratio:stop_words", {"percentage": 50.0}, ["the cat", "cat"], ["the cat is", "don't"]),
    ("custom:multiples", {}, ["14, 21, 28, 35, 42, 49"], ["7, 14, 21, 28, 35, 42, 49", "14 21"]),
    (
        "custom:mcq_count_length",
        {},
        [QUESTIONS],
        ["Sure!\n" + QUESTIONS, QUESTIONS.replace("E) yes", ""), QUESTIONS.replace(" so", "")],
    ),
    (
        "custom:reverse_newline",
        {},
        ["\n".join(COUNTRIES)],
        ["\n".join(COUNTRIES[:51]), "\n".join(sorted(COUNTRIES)), ", ".join(COUNTRIES)],
    ),
    (
        "custom:european_capitals_sort",
        {},
        [CAPITALS, CAPITALS.replace("Kyiv", "Kiev")],
        ["Oslo, Helsinki", CAPITALS + ", Rome"],
    ),
    ("custom:word_reverse", {}, ["Animal national the is eagle bald the."], ["The bald eagle is the national animal."]),
    ("custom:character_reverse", {}, ["lamina lanoitan eht si elgae dlab ehT"], ["eagle bald", "The bald eagle"]),
    ("custom:sentence_alphabet", {}, [ALPHABET], [ALPHABET[8:], ALPHABET.replace("Bnd", "And")]),
    (
        "custom:csv_city",
        {},
        [CITIES],
        [CITIES + "\n8,a,b,c,d", CITIES.replace(",Moundou", ""), CITIES.replace("ID", "Id")],
    ),
    (
        "custom:csv_special_character",
        {},
        [PRODUCTS],
        [PRODUCTS.replace("&", ""), PRODUCTS.replace('"', ""), PRODUCTS[:-20]],
    ),
    ("custom:csv_quotes", {}, [GRADES], [GRADES.replace('"1"', "1"), GRADES.replace("\t", ","), GRADES + '\n"1"']),
    (
        "custom:date_format_list",
        {},
        ["1805-12-02, 1806-10-14"],
        ["1805-13-02", "1905-12-02", "1805-2-2", "1806-02-30", "1805-12-02,"],
    ),
    (
        "repeat:repeat_change",
        {"prompt_to_repeat": "Write a poem."},
        ["Draft a poem."],
        ["Write a poem.", "Draft a poem. Roses"],
    ),
    ("repeat:repeat_simple", {}, [ONLY], [ONLY + " Sure.", ONLY[:-1]]),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2}, ["B c"], ["b", "b c d", "a b"]),
]


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), EXAMPLES)
def test_constraint(instruction, arguments, good, bad):
    for response in good:
        assert check_instructions("", response, [instruction], [arguments]) == [True], response
    for response in [*bad, "", " \n"]:
        assert check_instructions("", response, [instruction], [arguments]) == [False], response


def test_every_constraint_has_an_example_and_its_own_id():
    assert {example[0] for example in EXAMPLES} == set(IFBENCH) and len(IFBENCH) == 58
    assert len(INSTRUCTIONS) == len(IFEVAL) + len(IFBENCH)


def test_every_row_of_the_benchmark_can_be_checked(data_dir):
    """All ids are known and all stored arguments fit; what is followed strictly is followed loosely."""
    lines = (data_dir / "datasets" / "ifbench" / "IFBench_test.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    for row in rows:
        arguments = row["prompt"], row["prompt"], row["instruction_id_list"], row["kwargs"]
        strict, loose = check_instructions(*arguments), check_instructions_loose(*arguments)
        assert all(b for a, b in zip(strict, loose, strict=True) if a)
    assert {instruction for row in rows for instruction in row["instruction_id_list"]} == set(IFBENCH)
