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
# The tree itself, copied; what is installed for it, linked where that can be had, and pointed at the copy.
(cd "$tree" && tar cf - --exclude=./.venv --exclude=./.cache --exclude=./.git --exclude=node_modules \
    --exclude=__pycache__ --exclude='./.*_cache' --exclude=./.hypothesis --exclude='*.egg-info' .) |
    tar xf - -C "$place/tree"
chown -R "$user:" "$place/tree"
for part in .venv .cache/uv tests/servers/s3rver/node_modules; do
    mkdir -p "$(dirname "$place/tree/$part")"
    cp -al "$tree/$part" "$place/tree/$part" 2>/dev/null ||
        { rm -rf "${place:?}/tree/$part" && cp -a "$tree/$part" "$place/tree/$part"; }
done
grep -rlIF "$tree" "$place/tree/.venv/bin" "$place"/tree/.venv/lib/python*/site-packages/__editable__* |
    xargs sed -i "s#$tree#$place/tree#g" # a new file in the place of the linked one
# The interpreter may be root's own: then another one of its version.
python=$(readlink -f "$tree/.venv/bin/python")
if ! runuser -u "$user" -- test -x "$python"; then
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    other=$(PATH=/usr/local/bin:/usr/bin:/bin command -v "$name") ||
        { echo "other users may not run $python, and there is no $name for them" >&2 && exit 1; }
    ln -sf "$other" "$place/tree/.venv/bin/python"
    sed -i "s#^home = .*#home = $(dirname "$other")#" "$place/tree/.venv/pyvenv.cfg"
fi
cd "$place/tree"
echo "as user $user, in a copy of the tree:"
runuser -u "$user" -- env -u XDG_RUNTIME_DIR -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u TMPDIR \
    HOME="$place/home" USER="$user" LOGNAME="$user" .venv/bin/python -m pytest "$@"
