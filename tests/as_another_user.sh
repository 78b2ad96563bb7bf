#!/bin/sh
# Runs tests as an ordinary user, where root runs `make test`: in a copy of the tree, with a home of that user's own.
# Its arguments are pytest's. An ordinary user has run the tests as himself before, so nothing is left to do then.
set -eu
[ "$(id -u)" = 0 ] || exit 0
tree=$(cd "$(dirname "$0")/.." && pwd)
user=talaria-tests-$$
place=$(mktemp -d "${TMPDIR:-/tmp}/talaria-as-user-XXXXXX")
clear() {
    pkill -KILL -u "$user" 2>/dev/null || true
    userdel "$user" 2>/dev/null || true
    rm -rf "$place"
}
trap clear EXIT
trap 'exit 1' INT TERM
chmod 755 "$place"
useradd --home-dir "$place/home" --create-home --shell /bin/sh "$user"
mkdir "$place/tree"
(cd "$tree" && tar cf - --exclude=./.venv --exclude=./.git --exclude=__pycache__ --exclude='./.[mrpi]*_cache' \
    --exclude=./.hypothesis --exclude='*.egg-info' .) | tar xf - -C "$place/tree"
chown -R "$user:" "$place/tree"
# An environment of its own, from what is cached. The interpreter may be root's own: then another one of its kind.
python=$(readlink -f "$tree/.venv/bin/python")
if ! runuser -u "$user" -- test -x "$python"; then
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    other=$(PATH=/usr/local/bin:/usr/bin:/bin command -v "$name") ||
        { echo "other users may not run $python, and there is no $name for them" >&2 && exit 1; }
    python=$other
fi
cd "$place/tree"
env -u MAKEFLAGS make --silent PYTHON="$python" tools
# What is compiled already is good for any interpreter of the same kind, which compares time and size. What pytest
# compiles is not: tracebacks would name files that are closed to that user.
(cd "$tree" && find .venv/lib imaging transfer protocols blocks tasks flows talaria -name '*.pyc' ! -name '*-pytest-*' -print0 |
    tar cf - --null --files-from=-) | tar xf - --skip-old-files -C "$place/tree"
chown -R "$user:" imaging transfer protocols blocks tasks flows talaria
find .venv -type d -exec chown "$user:" {} +  # where that user's Python keeps what it has compiled; files may be others' too
echo "as user $user, in a copy of the tree:"
run() {
    runuser -u "$user" -- env -u XDG_RUNTIME_DIR -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u TMPDIR \
        HOME="$place/home" USER="$user" LOGNAME="$user" .venv/bin/python -m pytest "$@"
}
# What fails twice is run alone, after the run that this one goes beside.
run "$@" || { [ $? = 1 ] && flock "$tree/.cache/at-work" true &&
    run "$@" --numprocesses 0 --last-failed --last-failed-no-failures none; }
