#!/bin/sh
# Ask a served model one question with curl, and print the pieces of its answer as they come.
#
#   FEDLLM_URL=https://127.0.0.1:8443/v1 FEDLLM_CA=ca.pem FEDLLM_TOKEN=... sh examples/serving/ask_curl.sh
#
# Token and question go through pipes: all users of a machine can read the arguments of a command.
set -eu
printf 'Authorization: Bearer %s\n' "$FEDLLM_TOKEN" |
    curl --silent --show-error --fail-with-body --no-buffer --tlsv1.3 --cacert "$FEDLLM_CA" \
        --header @- --header 'Content-Type: application/json' --data @/dev/fd/3 "$FEDLLM_URL/chat/completions" 3<<'END'
{"messages": [{"role": "user", "content": "통장 재발급 수수료가 얼마예요?"}], "max_tokens": 40, "temperature": 0, "stream": true}
END
