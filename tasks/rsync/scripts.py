"""What a shell on the server does for an rsync target, before and after the files arrive."""

from __future__ import annotations

import re
from shlex import quote

INCOMPLETE = 3  # exit code of PLACE
SOME_REPLACED = "talaria: replaced"  # last words of PLACE, if files were in the way
# Scripts for a POSIX shell on the server; every @NAME@ is replaced by quoted words.
# What a killed rsync has left of files under temporary names would only take room.
# Prints where it is, and what an earlier attempt has given its final name already, although we did not hear of it.
PREPARE = """
mkdir -p @FOLDER@ && cd @FOLDER@ && mkdir -p @FOLDERS@ && [ -w . ] || exit 1
chmod 700 @INCOMING@
for one in @FOLDERS@; do rm -f "$one"/* "$one"/.[!.]*; done
pwd
cd @INCOMING@ && for one in placed-*; do [ ! -e "$one" ] || echo "$one"; done
"""
# mv -T never moves into a folder that is there; where mv doesn't know it, nobody but us makes folders of this name.
# Folders stay enterable for the group whatever the umask.
PLACE = """
cd @FOLDER@ || exit 1
base=$(pwd)
place() {  # number, name, how many files must have come ("" where an earlier attempt brought some)
  from=@INCOMING@/$1 to=./$2 replaced=$base/@INCOMING@/replaced-$1
  [ -d "$from" ] || { echo "what has come is gone: another attempt or program has cleared it"; exit 3; }
  rm -rf "$from/@TEMPORARY@"
  find "$from" -type d -name @PARTIAL@ -prune -exec rm -rf {} +
  count=$(find "$from" ! -type d -exec printf '%.0sx' {} + | wc -c)
  [ -z "$3" ] || [ "$count" -eq "$3" ] || { echo "$count of $3 files have come"; exit 3; }
  find "$from" -type d -exec chmod g+rx {} +
  case $to in ./*/*) mkdir -p "${to%/*}" || return 1 ;; esac
  if [ ! -e "$to" ]; then
    if mv -T -- "$from" "$to" 2>/dev/null; then return 0; fi
    if [ ! -e "$to" ]; then mv -- "$from" "$to"; return; fi
  fi
  rm -f "$to/@MARKER@"
  cd "$from" || return 1
  find . -type d -exec sh -c '
    to=$1; shift
    for one do [ -d "$to/$one" ] || mkdir "$to/$one"; done' sh "$base/$to" {} +
  find . ! -type d -exec sh -c '
    to=$1; replaced=$2; shift 2
    instance() {  # in hexadecimal, of Media Storage SOP Instance UID (0002,0003) of a file
      hex=$(od -An -v -tx1 -N @BEGINNING@ "$1" 2>/dev/null | tr -d " \\n")
      [ "$(printf %s "$hex" | cut -c257-264)" = 4449434d ] || return
      value=${hex#*020003005549}
      [ "$value" = "$hex" ] || printf %s "$value" | cut -c5-$((4 + 2 * 0x$(printf %s "$value" | cut -c1-2)))
    }
    for one do
      if [ -d "$to/$one" ]; then echo "$one: a folder of this name is in the way"; continue; fi
      [ -d "$to/${one%/*}" ] || { echo "$one: a file is in the way of its folder"; continue; }
      if [ -f "$to/$one" ] && ! cmp -s -- "$one" "$to/$one"; then
        ours=$(instance "$one") theirs=$(instance "$to/$one")
        if [ "$ours" ] && [ "$theirs" ] && [ "$ours" != "$theirs" ]; then echo "$one: "@OTHER@; continue; fi
        printf "%s\\\\0" "${one#./}" >>"$replaced"
      fi
      mv -f -- "$one" "$to/$one"
    done' sh "$base/$to" "$replaced" {} +
  cd "$base" || return 1
  [ -z "$(find "$from" ! -type d | head -n 1)" ]
}
note() { if [ $? -eq 0 ]; then : >@INCOMING@/placed-$1; else code=2; fi; }
@DROP@
code=0
@PLACES@
for one in @INCOMING@/replaced-*; do [ ! -e "$one" ] || { printf %s @REPLACED@; break; }; done
exit $code
"""
# Paths of the files in whose place others were, each with a NUL.
REPLACED = """
cd @FOLDER@/@INCOMING@ && cat replaced-@PLACE@ 2>/dev/null
"""
LEFT = """
cd @FOLDER@/@INCOMING@ && find @PLACE@ ! -type d -exec printf '%s\\0' {} +
"""
FINISH = """
cd @FOLDER@ || exit 1
for one in @LACKING@; do rm -f "./$one/@MARKER@"; done
for one in @NAMES@; do
  if [ ! -d "./$one" ]; then printf '%s\\0' "$one"
  elif [ ! -e "./$one/@MARKER@" ]; then : >"./$one/@MARKER@" || exit 1
  fi
done
rm -rf @INCOMING@
"""
REMOVE = """
cd @FOLDER@ && rm -f -- @PATHS@
"""
PROBE = """
folder=@FOLDER@
while [ ! -e "$folder" ]; do
  case $folder in */*) up=${folder%/*}; folder=${up:-/} ;; *) folder=. ;; esac
done
cd "$folder" || exit 1
: >@PROBE@ && mv -- @PROBE@ @PROBE@- && rm -- @PROBE@- || exit 1
printf '%s' "$folder"
"""


class Script(str):
    """Text that becomes part of a script without quoting."""


def filled(text: str, **words: str | list[str]) -> str:
    """Fill words into a script, quoted and in one pass, so that no filled-in text is replaced again."""

    def word(found: re.Match[str]) -> str:
        value = words[found[1]]
        if isinstance(value, Script):
            return value
        return quote(value) if isinstance(value, str) else " ".join(map(quote, value))

    return re.sub(r"@([A-Z]+)@", word, text)
