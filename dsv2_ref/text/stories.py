# SPDX-License-Identifier: MIT
"""Stories with a known entropy: a loss that can be compared with its floor.

On ordinary text nobody knows how low a language model's loss can go. Here the text comes from a
probabilistic grammar, small enough to know completely and rich enough to be worth learning: short
tales in English or Chinese about a hero who is given a thing, loses it, searches, and gets it
back. What is chosen once must be remembered: the hero's pronouns, the thing's colour and (in
Chinese) its measure word, who gave it, who took it, which moral belongs to which virtue.

Why the floor is exact. A derivation is the list of choices made. No two derivations give the same
text, so a text has as much entropy as its derivation, and by the chain rule that is

    H(story) = Σ over the places of choice  (expected visits) · H(probabilities there)

with no sampling. Expected visits are products of the probabilities on the way; a repeat with
probability q of one more round visits its inside q / (1 - q) times and chooses 1 / (1 - q) times.
The expected bytes are the same sum over fixed texts. That no text has two derivations is the one
thing to prove; the test does it with a parser of its own that sums over all derivations of a text:
the sum must be the probability of the one that was sampled.

What is counted. Stories are independent and each ends with the end-of-document mark, so a long
stream is a renewal process with the entropy rate H(story) / E[bytes of a story]. The numerator is
all that is uncertain in a story, where it ends included; the denominator is the UTF-8 bytes of the
texts, marks not counted. Score a model alike: -log2 p summed over the tokens of the stories and
their end marks (not the begin marks, which are certain), divided by those bytes. In expectation no
model scores lower, whatever its tokenizer; on n stories the noise is of order 1/sqrt(n). A window
that starts inside a story hides what was chosen before, and costs more.
"""

import random
from functools import cache

from dsv2_ref.text.grammar import (
    Bind,
    Choice,
    Node,
    Repeat,
    Seq,
    Story,
    maybe,
    measure,
    people,
    seq,
    table,
    tell,
)


def sample(seed: int, n: int, node: Node | None = None) -> list[Story]:
    """`n` independent stories; of `random` only what no Python release changes is used."""
    draw = random.Random(seed).random

    def pick(probabilities: tuple[float, ...]) -> int:
        u, i = draw(), 0
        while i < len(probabilities) - 1 and u >= probabilities[i]:
            u, i = u - probabilities[i], i + 1
        return i

    return [tell(STORY if node is None else node, pick) for _ in range(n)]


def log_probability(story: Story, node: Node | None = None) -> float:
    """log2 of the story's probability, from its choices. ValueError if they give another text."""
    left = iter(story.choices)

    def pick(probabilities: tuple[float, ...]) -> int:
        i = next(left, -1)
        if not 0 <= i < len(probabilities):
            raise ValueError(f"choice {i} in a story, expected 0 to {len(probabilities) - 1}")
        return i

    again = tell(STORY if node is None else node, pick)
    if again.text != story.text or next(left, None) is not None:
        raise ValueError(f"text {story.text[:40]!r} differs from its choices' {again.text[:40]!r}")
    return again.log2_probability


@cache
def _whole() -> tuple[float, float]:
    return measure(STORY)


def entropy_bits_per_story() -> float:
    """H(story), where it ends included; times ln 2 it is in nats, PyTorch's unit of loss."""
    return _whole()[0]


def mean_bytes_per_story() -> float:
    """E[UTF-8 bytes] of a story's text."""
    return _whole()[1]


def entropy_rate() -> float:
    """Bits per UTF-8 byte of a stream of stories: H(story) / E[bytes]."""
    return entropy_bits_per_story() / mean_bytes_per_story()


NAMES = "Lily Tom Mia Ben Anna Max Rosa Sam Nora Jack Emma Leo"      # girls and boys in turn
HEROES = people("hero he He him his kind", NAMES, "/she/She/her/her/girl", "/he/He/him/his/boy")
FRIENDS = people("friend f_he f_him f_kind", NAMES, "/she/her/girl", "/he/him/boy")


def english() -> Seq:
    def search(who: str) -> Repeat:
        return Repeat(0.5, seq(
            f" {who} looked (behind the wall|under a bush|up a ladder|inside a cart), but "
            "(found|saw) only (leaves|a feather|mud|an odd shoe|three snails|a rusty key)."))

    found = " the {colour} {thing} ({spot}|{corner}|{nook}). {undone}."
    helped = seq(
        "\n{friend}, (a friend from school|who lived nearby|the youngest {f_kind} in town), "
        "(heard|saw|met) {him} and (came|ran|hurried) to help.", search("They"),
        Choice((0.6, 0.4), (
            seq(f' (At last|Finally) {{friend}} found{found} "(Thank you|You are a friend)!" '
                "{hero} (said|whispered|said to {f_him})."),
            seq(f" (In the end|Before dark) {{hero}} found{found} {{friend}} (laughed|clapped|"
                "danced for joy), and {f_he} (hugged|cheered for) {him}."))))
    alone = seq("\nNobody was near.", search("{He}"), " (At last|Finally) {he} found" + found)
    return seq(
        HEROES,
        "(Once upon a time|Long ago|Many years ago) there (was|lived) a (little|young|small|tall|"
        "shy|cheerful) {kind} (named|called) {hero}.",
        table("virtue moral", """brave/courage finds a way; patient/those who wait are rewarded;
            kind/kindness comes back; clever/a good question opens every door;
            honest/truth is worth more than gold"""),
        " {He} was (very|always|truly) {virtue}",
        maybe(0.6, " and (loved|liked) (apples|honey|songs|bread|plums|frogs|maps|rain|stars)"),
        table("giver", "grandmother;father;uncle;aunt;teacher;neighbour;cousin"),
        table("colour", "red;blue;green;yellow;white;black;silver;purple"),
        table("thing play", """kite/flew it over the trees; ball/bounced it on the stones;
            drum/beat it like thunder; bell/rang it again and again; boat/pulled it on a string;
            lantern/swung it from side to side; puppet/made it dance; hat/wore it like a crown"""),
        ". (One day|For {his} birthday|Last winter), {his} {giver} gave {him} a {colour} {thing}.",
        maybe(0.5, ' "(Take good care of it|Be careful|Do not lose it)," said the {giver}.'),
        table("place spot corner nook", """to the beach/under a broken boat/behind the dunes/beside
            the lighthouse; into the forest/in a hollow oak/among the ferns/near the waterfall; to
            the park/below a bench/on top of the slide/next to the fountain; to the market/between
            two baskets/inside an empty barrel/under the fish stall"""),
        "\nOne (sunny|cloudy|windy|cold|warm|quiet) (morning|afternoon|evening), {hero} "
        "(took|brought) the {thing} {place} and {play}.",
        table("thief deed undone", """a strong wind/blew it away/The wind had dropped it there; a
            playful dog/ran off with it/The dog had forgotten it; an old crow/snatched it/The crow
            had grown tired of it; a hungry goat/carried it off/The goat had found it too hard
            to eat"""),
        " (Suddenly|Then|All at once) {thief} {deed}!",
        maybe(0.7, ' "(Oh no|Stop|Come back|Help)!" (cried|shouted|called) {hero}.'),
        Choice((0.7, 0.3), (Bind(FRIENDS, helped, "hero"), alone)),
        "\nThat (evening|night) {hero} showed the {colour} {thing} to {his} {giver}",
        maybe(0.6, " and (told the whole story|fell asleep at once|promised to be careful)"), ".",
        maybe(0.8, " (Since then|From that day on) everybody (knew|said) that {moral}."))


def chinese() -> Seq:
    names = "小红 小明 丽丽 大伟 小梅 阿强 小燕 东东 春花 石头 雪儿 建国"

    def search(who: str) -> Repeat:
        return Repeat(0.5, seq(f"{who}(去|到)(墙后|树上|井边|车里|屋顶上)(找了找|看了看)，"
            "只(看见|发现)(几片树叶|一根羽毛|一只旧鞋|三只蜗牛|一个铁罐)。"))

    found = "在({spot}|{corner}|{nook})找到了那{measure}{colour}的{thing}，{undone}。"
    helped = seq(
        "\n(好朋友|同学|邻居家的){friend}(听见|看见|知道)了，(马上|赶紧|立刻)(跑来|赶来|过来)帮忙。",
        search("两人"), Choice((0.6, 0.4), (
            seq(f"(最后|终于){{friend}}{found}{{hero}}对{{f_he}}说：“(谢谢你|多亏了你)！”"),
            seq(f"(最后|终于){{hero}}{found}{{friend}}(笑了|拍起手来|跳了起来)，{{f_he}}(真|很)高兴。"))))
    alone = seq("\n(附近|周围)没有人。", search("{he}"), "(最后|终于){he}" + found)
    return seq(
        people("hero he kind", names, "/她/小姑娘", "/他/小男孩"),
        "(从前|很久以前|许多年前)有一个(叫|名叫){hero}的{kind}。",
        table("virtue moral", "勇敢/勇气能找到出路;善良/好心总有好报;聪明/多想一想就有办法;"
            "耐心/慢慢来才能成功;诚实/真话比金子贵重"),
        "{he}(很|非常|一向|特别){virtue}",
        maybe(0.6, "，(喜欢|爱)(唱歌|画画|看书|下棋|爬树|钓鱼|种花)"),
        table("giver", "奶奶;爸爸;叔叔;姑姑;老师;爷爷;表哥"),
        table("colour", "红色;蓝色;绿色;黄色;白色;黑色;紫色"),
        table("measure thing play", "只/风筝/放得高高的;个/皮球/拍来拍去;面/小鼓/敲得咚咚响;"
            "盏/灯笼/提着走来走去;顶/帽子/戴在头上;条/小船/拖着跑来跑去;把/雨伞/转个不停;"
            "支/笛子/吹了一首歌"),
        "。(有一天|生日那天|去年冬天)，{giver}送给{he}一{measure}{colour}的{thing}。",
        maybe(0.5, "{giver}说：“(好好爱护它|要小心|别弄丢了)。”"),
        table("place spot corner nook", "公园/长椅下面/滑梯旁边/喷泉后面;河边/芦苇丛里/大石头上/"
            "小桥底下;山上/松树底下/山洞里面/草丛中间;集市/两个篮子中间/鱼摊底下/空木桶里"),
        "\n一个(晴朗|多云|温暖|凉爽|安静)的(早晨|下午|傍晚)，{hero}(带着|拿着){thing}(来到|去了)"
        "{place}，{play}。",
        table("thief deed undone", "一阵大风/把它吹走了/原来风把它吹到了这里;一条小狗/叼着它跑了/"
            "原来小狗早就玩腻了;一只乌鸦/抓着它飞走了/原来乌鸦嫌它太重;一只山羊/咬着它逃走了/"
            "原来山羊嫌它太硬"),
        "(突然|忽然|这时)，{thief}{deed}！",
        maybe(0.7, "“(糟了|不好了|站住|快回来)！”{hero}(喊道|叫了起来)。"),
        Choice((0.7, 0.3), (
            Bind(people("friend f_he", names, "/她", "/他"), helped, "hero"), alone)),
        "\n(晚上|回家后)，{hero}把{colour}的{thing}拿给{giver}看",
        maybe(0.6, "，(讲了事情的经过|很快就睡着了|答应以后要小心)"), "。",
        maybe(0.8, "(从此|从那天起)，大家都(知道|说)，{moral}。"))


STORY = Choice((0.6, 0.4), (english(), chinese()))
