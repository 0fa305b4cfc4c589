#!/bin/sh
# Installs the Orchestratia agent and command line for the user who runs it, registers this machine
# with the hub and starts its agent. Run again, it upgrades them: config, key and sessions stay.
#
#     curl -fsSL HUB/install.sh | sh -s -- TOKEN [--name NAME] [--repo NAME=PATH …]
#
# The braces make the shell read all of it before it does anything: a script that was cut off on
# its way does nothing.
{
set -u
umask 077
HUB='' AGENT_SHA256='' CLI_SHA256='' PACKAGES=''  # filled in by the hub

usage() {
    cat <<END
Usage: install.sh TOKEN [OPTIONS]     installs, registers and starts the agent
       install.sh [OPTIONS]           upgrades what is installed

TOKEN comes from the dashboard under Servers, or from: orchestratia server token

  --name NAME          what this server is called (default: its host name)
  --repo NAME=PATH     a repo and where it is; may be given again
  --language WORD      also --framework and --capability: what it offers; may be given again
  --slots N            tasks at once (default: processors + 2)
  --python PATH        use this Python 3.11 or newer as it is, with its packages, instead of
                       an environment of its own (also: ORCHESTRATIA_PYTHON)
  --no-start           do not start the agent
END
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

wrong() {
    printf 'install.sh: %s (install.sh --help tells more)\n' "$*" >&2
    exit 2
}

has() { command -v "$1" >/dev/null 2>&1; }

# ── what is there already ───────────────────────────────────────────────────────────────────────

config_value() {
    [ -f "$config" ] || return 0
    sed -n "s/^$1: *['\"]\{0,1\}\([^'\"]*\)['\"]\{0,1\} *\$/\1/p" "$config"
}

registered() { [ -n "$(config_value api_key)" ]; }

check_registration() {
    known=$(config_value hub_url)
    if ! registered; then
        [ -n "$token" ] || wrong "This machine is not registered yet: give a registration token."
    elif [ "${known%/}" != "$HUB" ]; then
        fail "This machine's agent belongs to the hub at $known, as $config says. If that is" \
            "another address of this one, change hub_url there; else move that file away."
    fi
}

# ── Python ──────────────────────────────────────────────────────────────────────────────────────

runs() {
    [ "$("$1" -c 'import sys; print(sys.version_info >= (3, 11))' </dev/null 2>/dev/null)" = True ]
}

find_python() {
    if [ -z "$python" ] && [ -f "$home/python" ]; then
        python=$(cat "$home/python")  # chosen at an earlier run
    fi
    if [ -n "$python" ]; then
        found=$(command -v "$python") || fail "There is no program $python."
        runs "$found" || fail "$found is not Python 3.11 or newer."
        python=$found
        check_packages
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if runs "$candidate"; then
            base=$candidate
            return
        fi
    done
    fail "Python 3.11 or newer is needed. Install it (Debian, Ubuntu: apt install python3" \
        "python3-venv; Fedora: dnf install python3) and run this again."
}

check_packages() {
    missing=$("$python" - $PACKAGES <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version

for name in (package.partition("==")[0] for package in sys.argv[1:]):
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
END
    ) || fail "$python does not run."
    # shellcheck disable=SC2086 (words)
    [ -z "$missing" ] || fail "$python lacks packages:" $missing
}

make_environment() {
    if ! runs "$home/venv/bin/python"; then
        "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null ||
            fail "Python's venv is missing. Install it (Debian, Ubuntu: apt install python3-venv)" \
                "and run this again."
        "$base" -m venv --clear "$home/venv" </dev/null || fail "Cannot make $home/venv."
    fi
    python=$home/venv/bin/python
    say "Installing packages: $PACKAGES"
    # shellcheck disable=SC2086 (words)
    "$python" -m pip install --quiet --disable-pip-version-check $PACKAGES </dev/null ||
        fail "The packages could not be installed: what pip said stands above."
}

# ── the programs ────────────────────────────────────────────────────────────────────────────────

fetch() {
    if has curl; then
        curl -fsSL -o "$new/$1" "$HUB/install/$1" </dev/null
    else
        wget -q -O "$new/$1" "$HUB/install/$1" </dev/null
    fi || fail "Cannot fetch $HUB/install/$1."
    sum=$("${python:-$base}" -c 'if True:
        import hashlib, sys
        print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$new/$1" </dev/null)
    [ "$sum" = "$2" ] ||
        fail "$1 is not the one this script is for (sha256 $sum, not $2): the hub may just have" \
            "been upgraded. Run this again."
    say "Fetched $1, sha256 $sum"
}

quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }

command_for() {
    printf '#!/bin/sh\nexec %s %s "$@"\n' "$(quoted "$python")" "$(quoted "$home/$2")" >"$new/$1"
    chmod 700 "$new/$1"
    mv -f "$new/$1" "$home/bin/$1"
}

install_programs() {
    mv -f "$new/agent.py" "$new/cli.py" "$home/"
    if [ "$python" = "$home/venv/bin/python" ]; then
        rm -f "$home/python"
    else
        printf '%s\n' "$python" >"$home/python"
    fi
    command_for orchestratia-agent agent.py
    command_for orchestratia cli.py
    for name in orchestratia-agent orchestratia; do
        link "$HOME/.local/bin/$name" "$home/bin/$name"
    done
}

link() {
    [ -d "$HOME/.local/bin" ] || return 0
    if [ -L "$1" ] && [ "$(readlink "$1")" = "$2" ]; then
        return 0
    elif [ -e "$1" ] || [ -L "$1" ]; then
        say "Left alone: $1 is there already and not from here."
    else
        ln -s "$2" "$1"
    fi
}

# ── the agent ───────────────────────────────────────────────────────────────────────────────────

register() {
    said=$("$python" "$home/agent.py" --register "$token" "$@" 2>&1 </dev/null)
    code=$?
    if [ "$code" -eq 0 ]; then
        say "${said%% Start its agent with:*}"
    elif registered; then
        say "$said"
        say "This machine stays registered as it was."
    else
        printf '%s\n' "$said" >&2
        exit "$code"
    fi
}

in_unit() { printf '%s' "$1" | sed 's/[\\"]/\\&/g; s/%/%%/g'; }

write_unit() {
    program=$(in_unit "$home/bin/orchestratia-agent" | sed 's/\$/$$/g')
    cat >"$home/orchestratia-agent.service" <<END
[Unit]
Description=Orchestratia agent

[Service]
# as it was where this was installed: there the coding agents are found
Environment="PATH=$(in_unit "$PATH")"
ExecStartPre="$program" --stop
ExecStart="$program" --quiet
Restart=on-failure
RestartSec=5
# sessions in tmux go on without the agent
KillMode=process

[Install]
WantedBy=default.target
END
}

is_service() { systemctl --user is-active --quiet orchestratia-agent >/dev/null 2>&1; }

start_agent() {
    if is_service; then
        pid=
        systemctl --user restart orchestratia-agent || fail "systemd could not restart the agent."
        return
    fi
    "$home/bin/orchestratia-agent" --stop </dev/null >/dev/null || exit 1
    # away from this terminal, whose end would otherwise end it too
    has setsid && away=setsid || away=
    $away nohup "$home/bin/orchestratia-agent" --quiet </dev/null >"$home/agent.out" 2>&1 &
    pid=$!
}

alive() { if [ -n "$pid" ]; then kill -0 "$pid" 2>/dev/null; else is_service; fi; }

online() {
    ORCHESTRATIA_HUB_URL=$(config_value hub_url) ORCHESTRATIA_API_KEY=$(config_value api_key) \
        "$home/bin/orchestratia" status --json </dev/null 2>/dev/null |
        grep -q '"server_status": "online"'
}

wait_online() {
    tries=0
    while :; do
        sleep 1
        if ! alive; then
            [ -z "$pid" ] || grep -v '^nohup:' "$home/agent.out" >&2
            fail "The agent has ended at once; its log tells more: $log"
        fi
        online && return
        tries=$((tries + 1))
        [ "$tries" -lt 20 ] || fail "The agent runs, but the hub does not hear it: $log tells more."
    done
}

# ── the rest ────────────────────────────────────────────────────────────────────────────────────

farewell() {
    case ":$PATH:" in
    *":$home/bin:"*) ;;
    *":$HOME/.local/bin:"*)
        [ -L "$HOME/.local/bin/orchestratia" ] || say_path
        ;;
    *) say_path ;;
    esac
    if [ -z "$start" ]; then
        say "Start the agent with: $home/bin/orchestratia-agent"
    elif is_service; then
        say "The agent runs as a service and is online. Its log: $log"
        return
    else
        say "The agent runs in the background and is online. Its log: $log"
    fi
    if has systemctl; then
        say "To have systemd start it with the machine:"
        say "    systemctl --user enable --now $(quoted "$home/orchestratia-agent.service")"
        say "    loginctl enable-linger     # so that it runs while you are signed out"
    else
        say "To have it start with the machine, add to your crontab:"
        say "    @reboot $(quoted "$home/bin/orchestratia-agent") --quiet"
    fi
}

say_path() {
    say "To have the commands on your PATH, add to ~/.profile:"
    say "    export PATH=\"\$HOME/.orchestratia/bin:\$PATH\""
}

main() {
    token='' python=${ORCHESTRATIA_PYTHON:-} base='' start=yes
    left=$#  # what is for the registration stays in "$@", behind what is still to be read
    while [ "$left" -gt 0 ]; do
        argument=$1
        shift
        left=$((left - 1))
        case $argument in
        --name | --repo | --language | --framework | --capability | --slots | --python)
            [ "$left" -gt 0 ] || wrong "$argument needs a value."
            if [ "$argument" = --python ]; then python=$1; else set -- "$@" "$argument=$1"; fi
            shift
            left=$((left - 1))
            ;;
        --python=*) python=${argument#--python=} ;;
        --name=* | --repo=* | --language=* | --framework=* | --capability=* | --slots=*)
            set -- "$@" "$argument"
            ;;
        --no-start) start='' ;;
        -h | --help)
            usage
            exit 0
            ;;
        orcreg_*) token=$argument ;;
        *) wrong "What is $argument? A registration token begins with orcreg_." ;;
        esac
    done

    [ -n "$HUB" ] || fail "A hub fills this script in: get it from there, as /install.sh."
    [ -n "${HOME:-}" ] && [ -d "$HOME" ] || fail "HOME is no directory."
    [ "$(uname -s)" = Linux ] || fail "The agent needs Linux; this is $(uname -s)."
    [ $# -eq 0 ] || [ -n "$token" ] || wrong "$1 goes with a registration token."
    home=$HOME/.orchestratia
    config=${XDG_CONFIG_HOME:-$HOME/.config}/orchestratia/config.yaml
    log=$(config_value state_dir)
    log=${log:-${XDG_STATE_HOME:-$HOME/.local/state}/orchestratia}/agent.log
    check_registration
    find_python
    has curl || has wget || fail "curl or wget is needed: install one and run this again."

    mkdir -p "$home/bin" && new=$(mktemp -d "$home/new.XXXXXX") || fail "Cannot write to $home."
    trap 'rm -rf "$new"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' HUP TERM
    fetch agent.py "$AGENT_SHA256"
    fetch cli.py "$CLI_SHA256"
    [ -n "$python" ] || make_environment
    install_programs
    say "Installed in $home"
    has tmux || say "Note: without tmux sessions end with the agent; better install it."
    [ -z "$token" ] || register "$@"
    write_unit
    if [ -n "$start" ]; then
        start_agent
        wait_online
    fi
    farewell
}

main "$@"
exit
}
