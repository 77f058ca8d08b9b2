#!/bin/sh
# Run Script phase "Export the model": EDGELLAMA_CHECKPOINT becomes model.edgellama in the app. Xcode runs it only when
# a file of model-inputs.xcfilelist is newer than model-outputs.xcfilelist's. A failed gate fails the build.
set -eu

checkpoint=$EDGELLAMA_CHECKPOINT
bundle=$TARGET_BUILD_DIR/$UNLOCALIZED_RESOURCES_FOLDER_PATH/model.edgellama
report=$TARGET_BUILD_DIR/edgellama-report  # beside the app, not in it

if [ -d "$checkpoint" ] && [ ! -e "$checkpoint/config.json" ] && [ ! -e "$checkpoint/params.json" ]; then
    set -- "$checkpoint"/*.gguf
    if [ ! -e "$1" ]; then
        echo "note: no checkpoint in $checkpoint, so no model is built into the app; import a bundle in the app"
        exit 0
    fi
    if [ $# -gt 1 ]; then
        echo "error: $checkpoint holds $# .gguf files; set EDGELLAMA_CHECKPOINT to one of them"
        exit 2
    fi
    checkpoint=$1
fi
if ! command -v "$EDGELLAMA" >/dev/null; then
    echo "error: $EDGELLAMA is not found; set EDGELLAMA in Config/Local.xcconfig to its whole path"
    exit 2
fi

set -- export "$checkpoint" --force --recipe "$EDGELLAMA_RECIPE" --context "$EDGELLAMA_CONTEXT"
for target in $EDGELLAMA_TARGETS; do
    set -- "$@" --target "$target"
done
if [ -n "$EDGELLAMA_MAX_KL" ]; then set -- "$@" --max-kl "$EDGELLAMA_MAX_KL"; fi
if [ -n "$EDGELLAMA_MAX_BYTES" ]; then set -- "$@" --max-bytes "$EDGELLAMA_MAX_BYTES"; fi
set -- "$@" --html "$report.html" --markdown "$report.md" --junit "$report.xml"
mkdir -p "$(dirname "$bundle")"
code=0
"$EDGELLAMA" "$@" --output "$bundle" || code=$?
if [ "$code" -ne 0 ]; then
    echo "error: edgellama export ended with exit code $code; what it says is above"
fi
exit "$code"
