#!/bin/sh
# Installs the Debian packages of the servers that tests talk to, where it may; else says what is missing.
set -eu
packages="dcmtk orthanc orthanc-dicomweb openssh-server openssh-client rsync rclone socat chromium redis-server postgresql nodejs npm tinyproxy rsyslog rsyslog-openssl prometheus"
missing=""
for package in $packages; do
    case "$package" in
    # Node may have come from elsewhere than Debian's packages.
    nodejs) command -v node >/dev/null 2>&1 && continue ;;
    npm) command -v npm >/dev/null 2>&1 && continue ;;
    esac
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ]; then
        run=""
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        run="sudo"
    else
        echo "the tests need these Debian packages, ask an administrator for them:$missing" >&2
        exit 1
    fi
    # The servers of tests are started by the tests: keep the packages from starting them as services.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | $run tee "$policy" >/dev/null
        $run chmod +x "$policy"
        trap '$run rm -f "$policy"' EXIT
    fi
    $run apt-get update -qq
    # shellcheck disable=SC2086
    $run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
# A store that damages what it gets over TLS, and what looks for barriers in pages: locks name versions and hashes, the
# registry is the configured one.
for store in "$(dirname "$0")/s3rver" "$(dirname "$0")/../front/axe"; do
    if ! cmp -s "$store/package-lock.json" "$store/node_modules/.installed"; then
        npm ci --silent --ignore-scripts --no-audit --no-fund --prefix "$store" >/dev/null
        cp "$store/package-lock.json" "$store/node_modules/.installed"
    fi
done
