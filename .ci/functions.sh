# What .ci/run and .ci/newest share: finding interpreters, environments of their own, steps, and the examples.

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export work
# Tests keep programs there for the next gate; JAX finds them by the program, versions and flags.
export PYTEST_ADDOPTS="-o cache_dir=${XDG_CACHE_HOME:-$HOME/.cache}/jaxrnn"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

# Print the path of the first of these versions of Python that runs.
find_python() {
    local version python
    for version in "$@"; do
        for python in "python$version" "$(pyenv root 2>/dev/null)"/versions/"$version".*/bin/python; do
            if "$python" -c "import venv" 2>/dev/null; then command -v "$python"; return; fi
        done
    done
}

# clone NAME PYTHON: a copy of the tree in $work/NAME, with an environment of its own in $work/NAME.env.
clone() {
    mkdir "$work/$1"
    git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/$1" 2>/dev/null || true
    "$2" -m venv "$work/$1.env"
}

# within NAME COMMAND...: run a command in the copy NAME with its environment.
within() {
    local name=$1; shift
    (cd "$work/$name" && PATH="$work/$name.env/bin:$PATH" && "$@")
}

install() {
    local name=$1; shift
    within "$name" python -m pip install --quiet "$@" >"$work/$name.pip" 2>&1 || { cat "$work/$name.pip"; return 1; }
}

# step NAME WHAT COMMAND...: run a command within NAME; tell how long it took, and what it printed if it failed. The
# steps after it run in any case: $work/failed has the names of those that failed.
step() {
    local name=$1 what=$2 log started=$SECONDS; shift 2
    log=$work/$name.$(date +%s%N).log
    if within "$name" "$@" >"$log" 2>&1; then
        printf '%4d s  ok    %s: %s (%s)\n' $((SECONDS - started)) "$name" "$what" "$(tail -n 1 "$log" | cut -c 1-90)"
        printf '%s\t%s\n' "$what" "$name" >>"$work/ran"
    else
        printf '%4d s  FAIL  %s: %s\n' $((SECONDS - started)) "$name" "$what"; tail -n 200 "$log"
        printf '%s\t%s: FAILED\n' "$what" "$name" | tee -a "$work/failed" >>"$work/ran"
    fi
}

versions() {
    within "$1" python -c "
import importlib.metadata, platform
def version(name):
    try: return name + ' ' + importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return 'no ' + name
print('Python ' + platform.python_version(), *map(version, ['jax', 'flax', 'numpy', 'torch', 'keras']), sep=', ')"
}

# examples COMMAND LINE...: run examples, two at a time, warnings being errors; each in a folder of its own.
examples() {
    printf '%s\0' "$@" | xargs -0 -P 2 -I{} bash -c '
        log=$(mktemp -p "$work"); top=$PWD
        cd "$(mktemp -d -p "$work")"
        if python -W error "$top"/examples/$0 >"$log" 2>&1; then printf "%s: %s\n" "$0" "$(tail -n 1 "$log")"
        else printf "%s failed:\n" "$0"; cat "$log"; exit 255; fi' {}
}
export -f examples
