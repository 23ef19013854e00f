"""A seeded generator of simple children's stories, for training without network access.

Each story comes from a template. `[a/b]` in it is a random choice, possibly of an empty string (`[a/]`), and
`{hero.his}` is a placeholder. The values of the placeholders come from the template's tables, one random row of each.
The cells of a row fit together: a problem, who helps with it, how it ends. A choice in a table is drawn once per story,
which keeps the story consistent; a choice in a template only varies the wording. All text was written for this project.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..config import StoryLLMError
from . import space_stories

T = TypeVar("T")
Row = dict[str, str]


class Noun(str):
    """A noun, possibly with adjectives. `noun.a` is the noun with its indefinite article."""

    @property
    def a(self) -> str:
        return f"{'an' if self[0] in 'aeiou' else 'a'} {self}"


@dataclass(frozen=True)
class Character:
    """A character in a story. `str(character)` is the name."""

    name: str
    kind: Noun  # such as "rabbit"
    home: str  # such as "in a warm cave"
    moved: str  # verb of movement in the past tense, such as "hopped"
    elder: str  # the adult who looks after the character, such as "her mom"
    he: str  # "he" or "she"; the fields below are the other forms
    him: str
    his: str
    He: str
    His: str

    def __str__(self) -> str:
        return self.name


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """A random item. Uses only `rng.random()`, whose numbers are the same in every Python version."""
    return items[int(rng.random() * len(items))]


def choose(rng: random.Random, text: str) -> str:
    """`text` with each `[a/b]` replaced by a random alternative, innermost first. A newline before `/` is ignored."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda choice: pick(rng, re.split(r"\n?/", choice[1])), text)
    return text


def table(text: str) -> list[Row]:
    """Parses a table into rows. The first line names the columns; a row may break its line after a `|`."""
    lines = text.strip().replace("|\n", "|").splitlines()
    names, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "He": "She", "His": "Her"},
    "he": {"he": "he", "him": "him", "his": "his", "He": "He", "His": "His"},
}
NAMES = {
    "she": "Anna Ella Emma Ivy Kate Lily Lucy Mia Molly Nora Rosie Ruby Sara Sophie Tess Zoe".split(),
    "he": "Ben Finn Fred Hugo Jack Leo Max Milo Ned Oscar Otto Paul Sam Tim Toby Tom".split(),
}
COLORS = "red blue green yellow orange pink".split()
FAMILY = "mom dad grandma grandpa".split()
TOYS = ("doll", "robot")

KINDS = table("""
kind     | moved                | home
rabbit   | hopped               | in a hole under an old tree
mouse    | ran                  | in a tiny hole in the wall
bear     | walked               | in a warm cave
fox      | [ran/walked]         | in a den in the forest
duck     | waddled              | in a nest by the pond
frog     | hopped               | in the tall grass by the pond
hedgehog | walked               | in a pile of leaves
squirrel | [ran/hopped]         | in a tall tree
kitten   | [ran/walked]         | in a house with a [red/green] door
puppy    | ran                  | in a house with a [big/little] yard
turtle   | walked               | by a slow river
pig      | [ran/walked]         | on a [small/big] farm
bird     | flew                 | in a nest in a tall tree
dragon   | flew                 | in a cave on a hill
doll     | walked               | in a toy box
robot    | rolled               | in a toy box
child    | [ran/walked/skipped] | in a [small/yellow/cozy] house [by the sea/in the village/near the forest/on a hill]
""")
KINDS += KINDS[-1:] * 7  # a third of the characters are children
PLACES = table("""
place      | spot_a              | spot_b             | spot_c                   | finder
the park   | under the bench     | behind the swings  | next to the slide        | [dog/goose/beetle]
the garden | between the flowers | behind the fence   | under a big leaf         | [bee/snail/butterfly]
the forest | under a bush        | behind a rock      | next to an old tree      | [owl/deer/beaver]
the beach  | behind a big rock   | under a boat       | on the warm sand         | [crab/gull/seal]
the farm   | behind the barn     | under the cart     | in the soft hay          | [cow/hen/horse/goat]
the pond   | behind a log        | in the tall grass  | under the little bridge  | [swan/otter/goose]
the meadow | under an apple tree | in the tall grass  | next to the little river | [sheep/butterfly/horse]
""")

OPENING = """
[Once upon a time there was {hero.kind.a} named {hero}. [{hero.He} lived {hero.home}./]
/Once upon a time there was {hero.kind.a}. {hero.His} name was {hero}[, and {hero.he} lived {hero.home}/].
/Once upon a time[,/] there was a [little/small/young/happy] {hero.kind} named {hero}. [{hero.He} lived {hero.home}./]
/Once upon a time, a [little/small/young] {hero.kind} named {hero} lived {hero.home}.
/{hero} was a [little/small/young/happy] {hero.kind}. {hero.He} lived {hero.home}.
/There once was a [little/small/young] {hero.kind} named {hero} who lived {hero.home}.
/A [little/small/happy] {hero.kind} named {hero} lived {hero.home}.]"""

LOST_THINGS = table("""
thing | use | gone | lesson
{color} kite | fly it | Then a strong wind pulled the string away. | held the string very tight
{color} balloon | play with it | Then the string slipped away, and the {thing} flew off. | held the string very tight
{color} [hat/scarf] | wear it in the sun | A strong wind blew, and the {thing} flew away. | held on to it in the wind
{color} ball | play with it | The {thing} rolled and rolled until it was gone. | kept the {thing} close
{color} [drum/bell/toy car/toy train] | play with it |
    {hero.He} put it down to look at a bug. Soon {hero.he} could not remember where it was. | took good care of it
""")
LOST = """
[{hero}/{hero.He}] had {thing.a}. [It was {hero.his} favorite thing in the world./{hero.He} loved it very much.
/It was a gift from {hero.elder}./{hero.He} took it everywhere.]
[One day/One morning/One sunny day], {hero} {hero.moved} to {place} to {use}. {gone}

"Oh [no/dear]!" cried {hero}. "[Where is my {thing}?/My {thing} is gone!/I lost my {thing}!]"
{hero} looked {spot_a}. {hero.He} looked {spot_b}. [But the {thing} was not there./But there was no {thing}.]
{hero.He} [felt very sad/sat down and cried/wanted to cry]. [Just then/Soon/Then], {finder.a} came by.

"[What is wrong/What is the matter/Why are you sad]?" asked the {finder}.
"I [lost/cannot find] my {thing}," said {hero}.
"[Do not worry/Do not be sad/I can help you]," said the {finder}. "I saw something {color} {spot_c}."

They [went/ran/hurried] to look. [There it was!/And there it was!/Yes!] The {thing} was {spot_c}.
"[Thank you/Thank you so much/You are very kind]!" said {hero}[ with a big smile/, and they danced with joy/].
[From that day on/After that], {hero} {lesson}[./, and {hero.he} never forgot the kind {finder}.
/. And {hero} and the {finder} were friends.]
"""

SKILLS = table("""
skill | place | teacher | fail | tip | success | never
swim | the pond | [otter/swan] | {hero.He} kicked and splashed, but {hero.he} could not stay up. |
    Lie on your back and look at the sky. | swam all the way across the pond | duck frog turtle robot doll
ride a bike | the park | [monkey/goat] | {hero.He} sat on the bike, but it fell over. |
    Look far ahead and not at your feet. | rode all the way around the park | duck frog turtle bird dragon robot
whistle | the hill | [farmer/horse] | {hero.He} blew and blew, but only air came out. |
    Make your mouth small and round, and blow softly. | whistled a happy song | duck bird robot doll
sing | the forest | [owl/deer] | {hero.He} opened {hero.his} mouth, but only a squeak came out. |
    Close your eyes and sing for the trees. | sang a song from start to end | bird robot
dance | the meadow | [butterfly/horse] | {hero.He} turned around and around, but {hero.he} fell on {hero.his} nose. |
    Listen to the wind first. Then let your feet go with it. | danced through the flowers | robot
jump rope | the park | [goat/monkey] | {hero.He} jumped, but the rope stopped at {hero.his} feet. |
    Count to three, and jump when you say three. | jumped ten times without a stop | bird robot turtle
read | the school | [owl/goose] | {hero.He} opened the book, but the letters looked like little bugs. |
    Say one letter at a time, and soon they make a word. | read a whole page | robot
catch a ball | the farm | [dog/goat] | {hero.He} held out {hero.his} arms, but the ball hit {hero.his} nose. |
    Look only at the ball and wait for it. | caught the ball five times | bird duck
""")
LEARN = """
[{hero}/{hero.He}] wanted to learn to {skill}. [{hero.He} thought about it every day./It looked like so much fun.
/It was {hero.his} biggest wish.] [One day/One morning/One fine day], {hero} {hero.moved} to {place} to try.

{fail} {hero.He} tried again, but it [did not work/was no better/went wrong again].
"[This is too hard/I cannot do it/I will never learn to {skill}]!" said {hero}[ sadly/].

[Then {teacher.a} came by./But {teacher.a} saw it all.] "[It was hard for me too/Do not give up]," said the {teacher}.
"{tip}" [So {hero} tried again./{hero} nodded and tried again./{hero} took a deep breath and tried once more.]
It [was a little better/went a little better] this time. {hero.He} tried [every day/the next day, and the next].

[Then, one day/One day/And then, at last], it worked! {hero} {success}.
"Look[ at me/]! I can {skill}!" [called/shouted] {hero}. The {teacher} [was very proud/cheered/smiled].
[{hero} learned that/Now {hero} knew that] [hard things get easy when you try and try/it is good to keep trying
/everybody can learn, one small step at a time].
"""

FEARS = table("""
fear | when | speech | brave | after | never
the dark | One night, the light went out, and every shadow looked like a monster. | The dark is only the day asleep |
    Together they looked at the moon, big and round. | said good night to the moon every night | -
thunder | One night, there was a storm, and the thunder said boom. | Thunder is only the clouds clapping their hands |
    "One, two, three, boom!" they counted together. | laughed when the thunder said boom | -
the big slide | One day at the park, {hero} climbed up and looked down. It was so high! | We can go down together |
    Down they went, and the wind blew on {hero.his} face. | went down the slide all alone, again and again | bird dragon
the water | One day at the beach, a big wave splashed {hero.his} nose. | You can put in just one foot |
    {hero.He} put in one foot, and the water was cool and soft. | jumped over the waves | duck frog turtle robot doll
the big dog | One day, the big dog ran to the fence and barked. | The dog only wants to say hello |
    "Hello, dog," said {hero}. The dog wagged its tail. | said hello to the dog every day | puppy bear dragon kitten
the old bridge | One day, {hero} had to cross it, and the river was far below. | Look only at the flowers over there |
    Step by step, {hero.he} walked to the flowers. | was the first to cross the bridge | bird duck frog turtle dragon
""")
FEAR = """
[{hero}/{hero.He}] was [happy, but {hero.he} was/a little] afraid of {fear}. {when}
{hero.His} heart went bump, bump, bump. {hero.He} [closed {hero.his} eyes/wanted to hide/wanted to run away].
"I am [scared/so scared/afraid]," [said/whispered] {hero}.

Then {hero.elder} [gave {hero.him} a hug/sat down next to {hero.him}/held {hero.him} close].
"[Everybody is afraid sometimes/It is all right to be afraid]," said {hero.elder}. "{speech}. I will stay with you."
{hero} took a deep breath. {brave} "[It is not so bad/This is not scary]," said {hero}. "I am not afraid [anymore/now]!"

[After that/From that day on], {hero} {after}. [{hero} was proud./{hero} felt very brave.
/To be brave is to try, even when you are afraid./With somebody you love, scary things get small.]
"""

GIFTS = table("""
gift | missing | place | owner | chore | chored | made | joy
[birthday/honey] cake | eggs | the farm | [hen/goose/farmer] | find my hat |
    looked in the hay and found the hat | baked the cake until it was golden | They ate the cake together.
[berry/apple] pie | sugar | the bakery | baker | sweep the floor | swept until the floor was clean |
    baked the pie until it was warm and golden | They ate the pie together.
flower crown | flowers | the meadow | [bee/butterfly] | count the roses | counted all the roses, from one to twenty |
    put the flowers together, one by one | {friend} wore the crown all day.
warm scarf | wool | the farm | sheep | comb my wool | combed until the wool was soft |
    made the scarf, row by row | {friend} wore the scarf all winter and was never cold.
soft pillow | feathers | the pond | [goose/swan] | clean my nest | cleaned the nest until it was lovely |
    put the feathers in the pillow and closed it well | That night, {friend} had sweet dreams on the pillow.
toy boat | wood | the river | beaver | carry some branches | carried branches all morning |
    cut the wood and put a little flag on the boat | They sailed the boat until the sun went down.
""")
GIFT = """
{hero.His} best friend was {friend.kind.a} named {friend}. It was [nearly/almost] {friend}'s birthday,
and {hero} wanted to make {gift.a} for {hero.his} friend.

But there was a problem. {hero} had no {missing}. So {hero.he} {hero.moved} to {place}. There {hero.he} met {owner.a}.
"[Please, may I have some {missing}/Do you have some {missing} for me]?" asked {hero}.
"[Yes/Of course]," said the {owner}, "but first, please help me. I have to {chore}."
[{hero} was happy to help./"I will help you," said {hero}.] {hero.He} {chored}.
"[Well done/Thank you]," said the {owner}, and gave {hero.him} the {missing}.

[At home/Back home], {hero} {made}. [It was beautiful./It took a long time./{hero.He} sang all the time.]
[The next day/On the big day], {hero} gave the {gift} to {friend}.
"[Did you make this for me/Is this for me]?" asked {friend}. "[I love it/It is wonderful/Thank you]!" {joy}
[The best gifts are made with love./{hero} was the happiest {hero.kind} of all./It felt good to make a friend happy.]
"""

QUARRELS = table("""
toy | place | crash | mend | deal
ball | [at the park/in the meadow] | The {toy} flew into a bush. | got the {toy} out of the bush |
    You can throw it, and I can catch it
kite | [on the hill/at the beach] | Snap! The string broke. | made a new string | You can run, and I can hold the string
sled | on the white hill | The {toy} slid down the hill, all by itself. | pulled the {toy} up again |
    There is room for two
wagon | [on the farm/at the park] | Crash! The {toy} fell over. | put the {toy} up again | You can sit, and I can pull
drum | [in the garden/in the meadow] | The {toy} fell down and rolled into the mud. | washed the {toy} |
    You can play the drum, and I can sing
book | [at school/under a tree] | Rip! A page came out. | put the page back in | I can read, and you can look
""")
QUARREL = """
{hero.His} best friend was {friend.kind.a} named {friend}. [They played together every day./They loved to play.]
[One day/One morning/One afternoon], they found {color.a} {toy} {place}.

"[I want it/It is mine/I saw it first]!" said {hero}. "No, [it is mine/I saw it first/give it to me]!" said {friend}.
They pulled and pulled. {crash} "[Look what you did/You are not my friend]!" shouted {hero}.
The two friends sat down, far away from each other.

It was very quiet. [{hero} felt sad./{hero} was not angry anymore./It was no fun to play alone.]
"{friend} is my best friend," {hero} thought. "[I miss {friend.him}/A friend is better than a {toy}]."
So {hero} got up. "I am sorry, {friend}," {hero.he} said. ["I was not kind."/"I do not want to fight."/]
"I am sorry too," said {friend}[ with a small smile/, and they had a big hug/].

Together they {mend}. "{deal}," said {hero}. "[Yes/Good idea/I like that]!" said {friend}.
They played with the {color} {toy} until [the sun went down/it was time to go home].
[It is more fun to share./Playing together is better than a fight./Good friends can say sorry.]
"""

PROMISES = table("""
task | harm | mend | result
water the flowers | The flowers were dry, and their heads hung down. | brought cup after cup of water |
    In the morning, the flowers stood tall again
feed the chicks | The chicks were hungry. "Peep, peep!" they cried. | gave the chicks a big bowl of corn |
    Soon the chicks were full and happy
look after the garden | A goat had come in, and all the carrots were gone. | put new seeds in the ground |
    Soon there were little green leaves in the garden
bring in the blankets | It was raining, and all the blankets were wet. | hung the blankets by the fire |
    At bedtime, the blankets were dry and warm
bring the sheep home | One little lamb was not there. | took a lamp and looked for the lamb |
    "Baa!" said the lamb, and it came running
pick the apples | The wind had blown the apples into the mud. | washed the apples, one by one |
    There were enough clean apples for a big pie
""")
PROMISE = """
[One day/One morning], {hero.elder} had to go to town. "Please {task}[ today/]," said {hero.elder}.
"[Yes, I promise/I will. I promise/I promise to do it]," said {hero}.

Then {hero.his} best friend came by. It was {friend}, {friend.kind.a}. "Come and play[ with me/]!" called {friend}.
They [played hide and seek/chased butterflies/ran up and down the hill/played with a ball] all [day/afternoon],
and {hero} forgot {hero.his} promise.

[In the evening/When the sun went down], {hero} remembered. "Oh no! [I promised to {task}/My promise]!"
{hero.He} [ran/hurried] home. But it was too late. {harm}

{hero} felt very bad. When {hero.elder} came home, {hero.he} told the truth.
"I forgot my promise. I am [so/very] sorry," said {hero}.
"[Thank you for telling the truth/It was brave to tell me]," said {hero.elder}. "Let us see what we can do."
So {hero} {mend}. {result}[, and {hero.elder} smiled/].
[From that day on, {hero} kept {hero.his} promises./After that, {hero} always did first what {hero.he} had promised.]
"""

PLANS = table("""
plan | ready | idea | fun
have a picnic in the meadow | put bread, cheese and apples in a basket | We can have our picnic under the table |
    They put a blanket on the floor. The bread and the cheese were wonderful.
build a sand castle at the beach | got a bucket and a little flag | We can build a castle right here, with pillows |
    They put pillow on pillow, up and up. At the top of the castle was the little flag.
sail a toy boat on the pond | put a white flag on the boat | We can sail it in the bath |
    The boat sailed around and around in the bath, and they made big waves.
play ball in the park | found a big red ball | We can roll the ball and hit some cups |
    They put ten cups on the floor and rolled the big red ball. Crash! All the cups fell down.
look at the stars on the hill | got a blanket and a lamp | We can make our own stars |
    They cut stars out of yellow paper. In the light of the lamp, the stars were golden.
play music in the garden | got a drum and a bell | We can play with the rain |
    Drip, drop, said the rain. Boom, boom, said the drum. Ding, ding, said the bell.
""")
RAIN = """
{hero.He} had a friend named {friend}, [who was {friend.kind.a}/{friend.kind.a}].
[One day/One morning/One afternoon], the two friends wanted to {plan}. They {ready}.
["This will be the best day ever," said {hero}./They could not wait to go./"I am so happy," said {hero}.]

But then dark clouds came, and it began to rain. [Drip, drop, drip, drop./It rained and rained./It did not stop.]
"Oh [no/dear]," said {friend}. "[Now we cannot {plan}/The rain has spoiled our day]." They were very sad.

[{hero} thought and thought./{hero} looked around and thought hard./Then {hero} jumped up.]
"I have an idea," said {hero}. "{idea}!" "[Yes/Yes, let us do that/That is a good idea]!" said {friend}.
{fun} They [laughed and laughed/laughed so much that they forgot the rain].

[Later/In the evening/After a while], the rain stopped, and there was a rainbow.
The next day, there were no clouds, and they could {plan} after all.
"[But I like rainy days too/But the rainy day was the best/With a good friend, every day is a good day]," said {hero}.
"""

FOODS = table("""
basket | food | thanks | never
[basket/bowl] of [red/sweet] berries | berries | [big yellow pear/little cake] | doll robot
bag of nuts | nuts | [cup of honey/sweet apple] | doll robot
[plate/bag] of [warm/golden] cookies | cookies | [cup of milk/bowl of berries] | doll robot
basket of [red/green] apples | apples | [warm apple pie/big bag of nuts] | doll robot
[basket/bag] of [sweet/orange] carrots | carrots | [bowl of soup/big bag of nuts] | doll robot
""")
SHARE = """
[One day/One morning/One afternoon], {hero} got a big {basket}.
"[These {food} are all for me/I will eat them all]," thought {hero}.
{hero.He} {hero.moved} to {place} and sat down {spot_a}, where nobody could see {hero.him}.

But {friend} came by. {friend} was {friend.kind.a}, and {friend.he} was very hungry.
"[What lovely {food}/Those {food} smell so good]!" said {friend}. "May I have [some/one], please?"
"No," said {hero}. "They are all mine." {friend} [walked away slowly/went away] with a sad face.

{hero} began to eat. But the {food} did not taste good. [{hero.He} felt bad./{hero.He} thought of {friend}'s sad face.
/It was lonely there.] {hero} jumped up. "{friend}, wait!" [called/shouted] {hero}.
"I am sorry. [Let us share/Come and eat with me]!" So they sat together {spot_a}.
One for you, one for me, until the {food} were gone. Now they tasted [wonderful/much better].

The next day, {friend} came with {thanks.a}.
"You shared with me," said {friend}, "and now I [want to/will] share with you."
[{hero} learned that it is good to share./From that day on, {hero} liked to share./And so {hero} had a new friend.]
"""

WISHERS = table("""
kind | home | wish | trouble | helper | offer | deed | end
pumpkin | in a garden | see the pond | pumpkins cannot walk | horse | You can ride in my cart |
    {hero.He} rolled into the cart, and the horse pulled it down the hill | There was the pond, blue and bright
pumpkin | in a field | shine in the dark | pumpkins have no light | firefly | I can sit on your head and shine |
    The firefly sat on {hero} and turned on its light | Now {hero} was as bright as a little moon
pumpkin | on a farm | have a friend | nobody ever came by | mouse | I am alone too. I can stay here |
    The mouse made a tiny bed next to {hero} | Every night, they told stories and looked at the stars
snowman | in a white garden | smell a flower | there are no flowers in winter | [girl/mouse] | I have one at home |
    Soon the {helper} was back with a yellow flower | It was sweet, like a summer day
star | high up in the sky | hear a song | the sky was so quiet | owl | I can fly up high and sing for you |
    The owl flew up and up, and sang all night | The song was soft and sweet
tree | on a hill | be a home for somebody | the birds liked only tall trees | bird | I need just one small branch |
    The bird made a nest on the smallest branch | Soon three baby birds sang in the nest
boat | by the sea | sail on the big waves | there was a hole in {hero.his} side | beaver | I can close the hole |
    The beaver worked all day until the hole was gone | {hero} sailed over the big, blue waves
snail | under a leaf | see the sea | snails are slow, and it was far away | [gull/goose] | You can sit on my back |
    {hero.He} held on, and they flew over the hills | There was the sea, big and blue
""")
WISH = """
[{hero}/{hero.He}] had [a/one big/a secret] wish. {hero.He} wanted to {wish}. But {trouble}.
"[I wish I could {wish}," {hero.he}/How can I ever {wish}?" {hero.he}] said [every day/every night].

[One day/One evening/Then, one day], {helper.a} came by.
"[Why are you so sad/What are you thinking about/What is the matter]?" asked the {helper}.
"I want to {wish}," said {hero}, "but [I cannot do it alone/I do not know how]."
The {helper} [thought for a while/sat down and thought/smiled]. "{offer}," said the {helper}.

"[Oh, yes/Oh, please/Yes, please]!" said {hero}. {deed}. {end}.
"[My wish came true/This is wonderful/I am so happy]!" said {hero}. "Thank you, [dear/kind] {helper}!"
[From that day on, they were friends./And {hero} was the happiest {hero.kind} in the world.
/Wishes come true when friends help./{hero} was never sad again.]
"""

TEMPLATES: dict[str, tuple[str, list[list[Row]]]] = {  # template name -> (template, its tables)
    "lost": (LOST, [LOST_THINGS, PLACES]),
    "learn": (LEARN, [SKILLS]),
    "fear": (FEAR, [FEARS]),
    "gift": (GIFT, [GIFTS]),
    "quarrel": (QUARREL, [QUARRELS]),
    "promise": (PROMISE, [PROMISES]),
    "rain": (RAIN, [PLANS]),
    "share": (SHARE, [FOODS, PLACES]),
    "wish": (WISH, [WISHERS]),
}


@dataclass(frozen=True)
class Genre:
    """A genre of stories: how they begin, their templates, and the kinds of their characters."""

    opening: str
    templates: dict[str, tuple[str, list[list[Row]]]]
    kinds: list[Row]


SPACE = Genre(
    space_stories.OPENING,
    {name: (text, list(map(table, tables))) for name, (text, tables) in space_stories.TEMPLATES.items()},
    table(space_stories.KINDS),
)
GENRES = {None: Genre(OPENING, TEMPLATES, KINDS), "space": SPACE}


def random_character(rng: random.Random, pronoun: str, kinds: Sequence[Row]) -> Character:
    """A character with the given pronoun, "he" or "she", of a kind drawn from `kinds`."""
    row = {column: choose(rng, cell) for column, cell in pick(rng, kinds).items()}
    kind = row["kind"]
    if kind == "child":
        kind = "girl" if pronoun == "she" else "boy"
    elder = "the big teddy bear" if kind in TOYS else f"{PRONOUNS[pronoun]['his']} {pick(rng, FAMILY)}"
    name = pick(rng, NAMES[pronoun])
    return Character(name, Noun(kind), row["home"], row.get("moved", "went"), elder, **PRONOUNS[pronoun])


def story_from_template(rng: random.Random, name: str, genre: Genre = GENRES[None]) -> str:
    """A random story from the template `name` of a genre. Blank lines separate its paragraphs.

    Hero and friend have different pronouns, so "she" is never ambiguous. Their kinds exclude those mentioned in the
    rows (no duck learns from a duck) and those in the "never" column (no duck learns to swim).
    """
    template, tables = genre.templates[name]
    row: Row = {}
    for rows in tables:
        row |= {column: choose(rng, cell) for column, cell in pick(rng, rows).items()}
    excluded = {*row.values(), *row.get("never", "").split()}
    kinds = [kind for kind in genre.kinds if kind["kind"] not in excluded]
    hero_pronoun, friend_pronoun = pick(rng, (("he", "she"), ("she", "he")))
    values: dict[str, object] = {
        "hero": random_character(rng, hero_pronoun, [row] if "kind" in row else kinds),
        "friend": random_character(rng, friend_pronoun, kinds),
        "color": Noun(pick(rng, COLORS)),
    }
    for column, cell in row.items():  # in order: a cell may refer to the cells before it
        values[column] = Noun(cell.format(**values))
    story = choose(rng, genre.opening + template).format(**values)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in story.strip().split("\n\n"))


def synthetic_story(seed: int, split: str, index: int, genre: str | None = None) -> str:
    """Story number `index` of a split, "train" or "validation". The same arguments give the same text on every machine.

    `genre` is a key of `GENRES`. Raises StoryLLMError for any other split.
    """
    if split not in ("train", "validation"):
        raise StoryLLMError(f"split is {split!r}, must be 'train' or 'validation'")
    rng = random.Random(f"{seed}/{split}/{index}")
    story = story_from_template(rng, pick(rng, list(GENRES[genre].templates)), GENRES[genre])
    return story if rng.random() < 0.7 else story.replace("\n\n", " ")  # some stories are a single paragraph


def synthetic_stories(seed: int, split: str, count: int, genre: str | None = None) -> Iterator[str]:
    """The first `count` stories of a split."""
    return (synthetic_story(seed, split, index, genre) for index in range(count))
