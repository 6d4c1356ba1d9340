#!/usr/bin/env bash
# Writes ci/environments/NAME.txt: all packages that REQUIREMENTS resolve to today, pinned.
#   ci/pin.sh NAME REQUIREMENT...
set -euo pipefail
name=$1
shift
report=$(mktemp)
python -m pip install --quiet --dry-run --ignore-installed --report "$report" "$@"
python - "$report" "$*" > "$(dirname "$0")/environments/$name.txt" <<'PYTHON'
import json, sys
packages = {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in json.load(open(sys.argv[1]))["install"]}
print(f"# ci/pin.sh resolved this from: {sys.argv[2]}")
for name, version in sorted(packages.items()):
    print(f"{name}=={version.partition('+')[0]}")
PYTHON
