#!/usr/bin/env bash
# The step "Export and validate" of action.yml: inputs come as environment variables, outputs go to GITHUB_OUTPUT, the
# summary to GITHUB_STEP_SUMMARY, and the exit code is edgellama's.
set -euo pipefail

output() {
    case $2 in *$'\n'*) echo "::error::the path of $1 holds a line break" && exit 2 ;; esac
    printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"
}

reports=$RUNNER_TEMP/edgellama-reports
rm -rf "$reports" && mkdir -p "$reports"
output reports "$reports"
files=(--html "$reports/report.html" --markdown "$reports/report.md" --junit "$reports/report.xml")

export_options=(--force --recipe "$EDGELLAMA_RECIPE")
for target in $EDGELLAMA_TARGETS; do export_options+=(--target "$target"); done
if [ -n "$EDGELLAMA_CONTEXT" ]; then export_options+=(--context "$EDGELLAMA_CONTEXT"); fi
if [ -n "$EDGELLAMA_MAX_BYTES" ]; then export_options+=(--max-bytes "$EDGELLAMA_MAX_BYTES"); fi
validate_options=(--reference "$EDGELLAMA_CHECKPOINT" --tokens "$TOKENS" --json "$reports/report.json")
if [ -n "$BASELINE" ]; then validate_options+=(--baseline "$BASELINE"); fi
if [ -n "$EDGELLAMA_MAX_KL" ]; then
    export_options+=(--max-kl "$EDGELLAMA_MAX_KL")
    validate_options+=(--max-kl "$EDGELLAMA_MAX_KL")
fi

code=0
"$EDGELLAMA" export "$EDGELLAMA_CHECKPOINT" --output "$BUNDLE" "${export_options[@]}" "${files[@]}" || code=$?
if [ "$code" -eq 0 ]; then
    output bundle "$BUNDLE"
    "$EDGELLAMA" validate "$BUNDLE" "${validate_options[@]}" "${files[@]}" || code=$?
fi
output exit-code "$code"
if [ -f "$reports/report.md" ]; then cat "$reports/report.md" >>"$GITHUB_STEP_SUMMARY"; fi
case $code in
    0) output verdict pass ;;
    1) output verdict fail ;;
    3) output verdict inconclusive ;;
esac
if [ -f "$reports/report.xml" ]; then
    python - "$reports/report.xml" "$BUNDLE/manifest.json" >>"$GITHUB_OUTPUT" <<'END'
import json, sys
from pathlib import Path
from xml.etree import ElementTree

properties = ElementTree.parse(sys.argv[1]).iter("property")
found = [float(p.attrib["value"]) for p in properties if p.attrib["name"] == "kl_mean"]
print(f"kl={max(found)}" if found else "kl=")
manifest = Path(sys.argv[2])
artifacts = json.loads(manifest.read_text("utf-8"))["artifacts"] if manifest.is_file() else []
print(f"bytes={sum(a['bytes'] for a in artifacts) or ''}")
END
fi
if [ "$code" -ne 0 ]; then
    echo "::error::edgellama ended with exit code $code; what it says is above"
fi
exit "$code"
