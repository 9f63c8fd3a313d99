#!/bin/sh
# certs.sh             makes certificates for all of $NODES that have none, and copies to each node's volume what is its own
# certs.sh renew NAME  the same after `sfl certs renew NAME`; likewise revoke and list
set -eu
umask 077

if [ $# -gt 0 ]; then
    verb=$1
    shift
    sfl certs "$verb" --out /authority "$@"
elif [ ! -e /authority/authority/ca.pem ]; then
    # shellcheck disable=SC2086  # words of a list
    sfl certs make --out /authority $NODES
else
    missing= option=
    for word in $NODES; do
        case $word in
        --*) option=$word ;;
        *) [ -d "/authority/nodes/${word%%=*}" ] || missing="$missing $option $word" ;;
        esac
    done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || sfl certs add --out /authority $missing
fi

# A running daemon takes a renewed certificate from its folder, and a server a new list of the revoked.
for node in /authority/nodes/*; do
    target=/nodes/$(basename "$node")
    [ -d "$target" ] || continue # a node elsewhere
    for file in "$node"/*; do
        copy=$target/.$(basename "$file")
        cp "$file" "$copy"
        chown 10001:10001 "$copy"
        mv "$copy" "$target/$(basename "$file")"
    done
    chown 10001:10001 "$target"
    chmod 700 "$target"
done
