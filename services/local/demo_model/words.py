"""The words that keys are made of. The tokenizer is trained so that each of them, with its leading space, is one token."""

from __future__ import annotations

ADJECTIVES = tuple(
    """amber ancient arctic blue bold brave bright broken bronze busy calm cheap clean clever cold copper crimson
    curved dark deep dry dusty early eager empty faint fast fierce final flat fresh frozen gentle giant golden grand
    green grey happy heavy hidden hollow honest humble icy inner iron ivory jolly keen large late lazy light little
    lonely long loud lucky merry mild misty modern muddy narrow noble old olive orange outer pale patient plain polar
    polite proud purple quick quiet rapid rare red rich rough round royal rusty sandy secret sharp shiny short silent
    silver simple sleepy slow small smooth soft solar spare spicy steady steep stormy strange strong sunny sweet swift
    tall tame tender thin tidy tiny velvet violet warm wary white wild windy wise wooden yellow young""".split()  # noqa: SIM905 - a list of 200 quoted words is no easier to read
)

NOUNS = tuple(
    """acorn anchor apple arrow badger bakery barn basket beach bear beaver bell bench berry bicycle bird boat book
    bottle bridge brook bucket butter cabin cable camel camera candle canyon castle cat cave cedar cellar chair cherry
    clock cloud coin comet compass coral cottage cow crane crow cup daisy desert diamond doctor dog dolphin donkey door
    dragon drum duck eagle ember engine falcon farm feather fern ferry field finch fish flame flute forest fountain fox
    frog garden gate ghost giraffe glacier goat goose grape guitar hammer harbor hawk hill honey horse hotel island
    jacket jaguar jar jungle kettle kite kitten ladder lake lamp lantern leaf lemon leopard library lion lizard locker
    magnet mango maple market meadow melon mill mirror mole monkey moon moose mountain mouse museum needle nest oak
    ocean office orchard otter owl oyster paddle palace panda paper parrot path peach pearl pebble pencil piano pigeon
    pilot pine pirate planet plum pocket pond pony puppet quarry rabbit raft rain raven ribbon river robin rocket roof
    rose sailor salmon school seal shadow shark sheep shelf ship shoe silo snail snow sparrow spider spoon squirrel
    star station stone storm stove street sugar swan table teacup temple tent tiger toad tower trail train tree trumpet
    tulip tunnel turtle valley village violin wagon wall walnut well whale wheel willow window wolf wren zebra""".split()  # noqa: SIM905 - a list of 200 quoted words is no easier to read
)
