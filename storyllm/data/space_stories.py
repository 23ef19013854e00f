"""Templates and tables of the synthetic stories about space. `synthetic.py` explains the notation and fills them in."""

from __future__ import annotations

KINDS = """
kind      | moved   | home
robot     | rolled  | [in a silver space station/on the moon/in a rocket with a round window]
alien     | hopped  | [on a small purple planet/on a warm green planet/on a planet with two suns]
astronaut | floated | [in a silver space station/in a round house on the moon]
mouse     | ran     | [in a tiny crater on the moon/in a rocket with a round window]
kitten    | floated | [in a rocket with a round window/in a silver space station]
child     | floated | [in a round house on the moon/in a silver space station/on a planet with two suns]
"""
PLANETS = """
planet                    | sight
the red planet            | They slid down the red sand hills and wrote their names in the dust.
the ice planet            | They built an ice castle with three towers.
the green planet          | They ate sweet blue fruit and slept under giant leaves.
the singing planet        | The wind sang in the caves, and they sang along.
the tiny planet           | They walked all the way around it before lunch.
the planet with the rings | They skated on the icy rings until they were dizzy.
"""

OPENING = """
[Once upon a time there was {hero.kind.a} named {hero}. [{hero.He} lived {hero.home}./]
/Once upon a time, a [little/small/young/brave] {hero.kind} named {hero} lived {hero.home}.
/Once upon a time, far away in space, there was [a little/a young/a brave] {hero.kind} named {hero}.
/{hero} was a [little/small/young/brave] {hero.kind}. {hero.He} lived {hero.home}.
/There once was a [little/young/brave] {hero.kind} named {hero} who lived {hero.home}.]"""

REPAIRS = """
part | sign | need | helper | offer | deed
engine | The engine coughed twice and stopped. | a strong spring | moon crab | There is a strong spring in my bed |
    The {helper} brought the spring, and {hero} put it into the engine
window | Crack! A little stone hit the window. | something clear and hard | ice beetle | I can make clear, hard ice |
    The {helper} blew on the window until there was ice all over the hole
antenna | Crunch! The antenna hit a stone, and the radio was quiet. | something long and thin | star snail |
    You can have my walking stick | {hero} put the stick on the roof, and the radio said hello
fuel tank | Drip, drip, drip, went the fuel. | something sticky | space bee | I have a pot of sticky honey |
    They put honey on the hole, and not one drop came out
wing | A stone flew by and made a hole in the left wing. | some cloth | moth | You can have my blanket |
    {hero} sewed the blanket over the hole, and the {helper} held the thread
headlight | The headlight went out, and it was very dark. | a new light | firefly | I can be your light |
    The {helper} sat down at the front of the rocket and shone like ten stars
"""
REPAIR = """
{hero.He} had {color.a} rocket. [One day/One morning/One evening], {hero.he} wanted to fly to {planet}.
"Three, two, one, go!" [said/shouted] {hero}. And up the rocket went, [past the moon/past the sun/up to the stars].

But then something went wrong. {sign} [The rocket turned around and around./The rocket could not fly on.]
"Oh [no/dear]," said {hero}. "[My {part} is broken/I cannot fly without {part.a}]!"
{hero.He} landed on a [small gray/dark and quiet] moon. [{hero} felt lonely there./Nobody seemed to live there.]

[Just then/Soon/Then], {helper.a} [looked out of a crater/came out of a hole]. "[What is the matter/What is wrong]?"
asked the {helper}. "The {part} of my rocket is broken," said {hero}. "I need {need}."
"[I can help you/Let me think]," said the {helper}. "{offer}." {deed}.
[The rocket was as good as new./It worked!/Now the rocket could fly again.]

"[Thank you/You are so kind]," said {hero}. "[Please come with me./Do you want to come with me?]"
So they flew to {planet} together. {sight}
[From that day on, {hero} never flew alone./"It is better to fly with a friend," said {hero}.
/{hero} was almost glad about the broken {part}, because now {hero.he} had a friend.]
"""

WORDS = """
word | meaning | sign | right | end
Zim zim | water | pointed to {friend.his} dry mouth | a cup of water | drank it all
Bolo bolo | blanket | was shaking from nose to toes | a warm blanket | was warm at last
Tuka tuka | bandage | held up one sore foot | a soft bandage | could walk again
Nanu nanu | bread | rubbed {friend.his} empty belly | a big piece of bread | ate it all
Lumi lumi | lamp | looked into the dark cave and did not go in | a little lamp | went into the cave without fear
Pako pako | map | turned left, then right, then left again | an old map | knew the way home
"""
LANGUAGE = """
[One day/One morning/One fine day], {hero}'s rocket landed on {planet}. There {hero.he} met {friend.kind.a}
[with big eyes/with a friendly face/in a silver suit]. It was {friend}, [and {friend.he} looked sad/who looked worried].

"{word}," said {friend}. "{word}!" {hero} did not know what that meant.
"[Hello/Good day]," said {hero}. "[Do you want a toy/Do you want to play]?" But {friend} shook {friend.his} head.
"[Do you want a hat/Is it your birthday]?" asked {hero}. {friend} shook {friend.his} head again. "{word}!"

[{hero} stopped talking and looked./Then {hero} stopped and looked.] {friend} {sign}. "[Now I see/Oh]!" said {hero}.
{hero.He} ran to the rocket and came back with {right}. {friend} {end}.
"[Zoo la/Minga]!" said {friend} with a big smile. {hero} knew [at once/right away] that it meant thank you.

[All afternoon/Until evening], the two new friends taught each other words.
[At bedtime/That night], {hero} wrote in {hero.his} book that {word} means {meaning}.
[You can understand a friend when you look and listen./{hero} and {friend} were friends from that day on.]
"""

SKY = """
picture | clue | place
Swan | a long white neck | at the tip of the wing
Fish | a tail that never gets wet | at the end of the tail
Bear | a big round ear | next to the ear
Ship | a sail without wind | at the top of the sail
Cup | a golden handle | on the handle
Dragon | a long tongue of fire | between the two eyes
Crown | seven points of gold | on the middle point
"""
FALLS = """
landing | noise | stuck | free
lake | Splash! | The star was wet and cold | pulled the star out with a net
tree | Crack! | The star hung from a branch | climbed up and shook the branch
pile of sand | Poof! | Only one point of the star looked out of the sand | dug in the sand with a spoon
bush | Rustle! | The star sat in the thorns | cut the thorns, one by one
chimney | Clang! | The star was black from top to bottom | let down a rope and washed the star
"""
STAR = """
[One night/One evening], {hero} looked out of the window. A [little/tiny] star fell from the sky. {noise}
It had landed in {landing.a}. {hero} {hero.moved} out to look. {stuck}. "[Help/Help me], please!" cried the star.
{hero} {free}. "Thank you," said the star, "but how can I get home? I do not know where I belong."

"[What do you remember/Do you remember anything]?" asked {hero}.
The star thought and thought. "Every night I saw {clue}," said the star.
"[I know that picture in the sky/Then I know your home]!" said {hero}. "You belong to the {picture}!"

{hero} put the star into {hero.his} {color} rocket, and they flew [up and up/higher than ever before].
They passed [the moon/three sleepy moons] and [a comet with a long tail/a cloud of golden dust].
There was the {picture}, but it had a dark spot {place}. "[That is my place/There I belong]!" said the star.
{hero} [opened the window/opened the door], and the star jumped out. At once the {picture} was bright again.

[Every night/From then on], the star winked at {hero}, {place} of the {picture}.
["Good night, little star," said {hero}, and fell asleep./{hero} always winked back.
/And {hero} knew that everybody has a place.]
"""

RACES = """
course | danger | rope | prize
around the moon | flew into a deep crater | [a long rope/a strong chain] | [a golden cup/a round cake]
around the red planet | got stuck in the red sand | [a shovel/a long rope] | [a silver cup/a big pie]
through the rings | hit a ring and spun like a top | [a big net/a strong magnet] | [a golden ring/a round cake]
to the comet and back | was caught in the icy tail | [a warm lamp/a big hammer] | [a golden star/a silver cup]
to the three moons | ran out of fuel | [a bucket of fuel/a long rope] | [three golden balls/a big pie]
"""
RACE = """
{hero.His} friend was {friend.kind.a} named {friend}. [They both had fast rockets./Both of them loved to fly fast.]
[One day/On Sunday/One morning], there was a rocket race {course}. The prize was {prize}.
"I [will/am going to] win," said {hero}. "No, I will," said {friend}, and they laughed. "Three, two, one, go!"

{hero} flew left, and {friend} flew right. [First {hero} was ahead, then {friend}./They were as fast as lightning.]
But then {friend}'s rocket {danger}. "[Oh no/Help]!" [called/cried] {friend} over the radio.
{hero} could see the [finish/end of the race] already.
[{hero.He} thought of the prize. Then {hero.he} thought of {friend}.
/{hero.He} wanted to win so much! But a friend was in trouble.] {hero} turned {hero.his} rocket around.

"[I am coming/Wait for me], {friend}!" said {hero}. {hero.He} came with {rope}, and soon {friend} was free.
"[But now you cannot win/You turned around for me]," said {friend}.
"[You are more important/I do not mind]," said {hero}.
[Side by side/Together], they flew to the finish, and everybody [clapped/cheered].

The captain gave {prize} to both of them. [They shared it./"You both won," said the captain.]
[A race is fun, but a friend is better./{hero} and {friend} were the happiest pilots in space.]
"""

PLANTS = """
plant | lacks | found | care | gift
rose | water | a block of ice behind a rock | melted the ice and gave the {plant} water every day |
    smelled as sweet as home
sunflower | light | a mirror in the station | turned the mirror until sunlight fell on the {plant} |
    was as yellow as the sun
bean | something to climb on | an old antenna | put the antenna next to the {plant} | climbed up to the stars
tulip | warmth | a lamp in the kitchen | put the lamp next to the {plant} at night | was as red as a heart
apple tree | good soil | some soil in the garden of the station | brought the soil in {color.a} bucket |
    had three small apples
pumpkin | air | a glass dome | put the dome over the {plant} and filled it with air | was as round as the moon
"""
GARDEN = """
[One day/One morning], {hero} found a seed in {hero.his} pocket. It was the seed of {plant.a}.
"[Nothing grows here/There is no garden here]," said [everybody/the captain]. But {hero} wanted to try.
{hero.He} put the seed into the gray dust. {hero.He} waited [a day, and another day/for three days]. Nothing came up.

"[What is missing/What does a plant need]?" thought {hero}. {hero.He} looked into a big book about plants.
"It needs {lacks}!" said {hero}. {hero.He} looked [everywhere/all over the place] and found {found}.
{hero.He} {care}. "[Please grow/You can do it], little plant," said {hero}.

[One morning/At last], there was something green in the dust! It grew [a little every day/taller and taller].
[Soon/After some weeks], the {plant} {gift}. Everybody came to look.
"[You were right/I have never seen anything so beautiful]," said [the captain/everybody] to {hero}.
[It was the first garden in space./{hero} smiled. "It only needed {lacks}," {hero.he} said.
/And {hero} planted another seed right next to the {plant}.]
"""

MEMORIES = """
missed | like | tool | done
the rain | Drip, drop, it went on the roof | peas and a pan | let the peas fall into the pan, drip, drop
the birds | They sang every morning | a whistle | whistled softly at the door every morning
the sea | The waves said hush, hush | a box of sand | moved the box from side to side, hush, hush
the snow | It was soft and white | white paper | cut the paper into little pieces and threw them into the air
the green grass | It tickled my feet | a green blanket | cut the blanket until it was like grass, soft and tickly
the campfire | We sat around it and told stories | an orange lamp | put the lamp on the floor and told a story
"""
HOMESICK = """
[One day/One morning], someone new came to live there. It was {friend.kind.a} named {friend}.
{friend} did not [eat much/want to play]. {friend.He} looked out of the window at the blue Earth, far, far away.
"[Why are you so sad/What is the matter]?" asked {hero}. "I miss {missed}," said {friend}. "{like}."

{hero} wanted to help. ["Space has no such thing," said the captain./But the Earth was too far away.]
{hero.He} [thought all night/thought hard]. [Then {hero.he} jumped up./In the morning, {hero.he} had an idea.]
{hero.He} got {tool} and [ran/hurried] to {friend}. "[Close your eyes/Sit down and close your eyes]," said {hero}.
Then {hero.he} {done}.

{friend} [sat very still/was quiet for a while]. Then {friend.he} smiled.
"[That is just like {missed}/It is like home]!" said {friend}.
"[Will you do it again tomorrow/Can we do it again]?" "[Yes/Of course]," said {hero}.
[From that day on/After that], {friend} [laughed and played with {hero}/showed {hero} all the games from home].
[Home is where a friend is./And when {friend} missed {missed}, {hero} was there./Soon {hero} loved {missed} too.]
"""

TEMPLATES = {  # template name -> (template, its tables)
    "repair": (REPAIR, [REPAIRS, PLANETS]),
    "language": (LANGUAGE, [WORDS, PLANETS]),
    "star": (STAR, [SKY, FALLS]),
    "race": (RACE, [RACES]),
    "garden": (GARDEN, [PLANTS]),
    "homesick": (HOMESICK, [MEMORIES]),
}
