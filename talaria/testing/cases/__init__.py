"""The cases of the conformance suite, by what they are about; `talaria.testing.conformance` takes them all.

checks   a server that answers, one that does not, and what a check leaves behind
arrival  files of all kinds and names, and how it is verified that they came
repeats  pushes that are made again
faults   pushes that go wrong, or are watched or stopped
reports  progress, errors, and what must stand in neither
compare  what the server must hold, which all of them assert
"""
