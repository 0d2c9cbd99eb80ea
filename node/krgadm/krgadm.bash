# bash completion of krgadm

# The ids of the nodes in a state, each after the items that are in the list
# already: LIST is 2,3,6-10.
_krgadm_ids() {
    local before= id
    [[ $cur == *[,-]* ]] && before=${cur%"${cur##*[,-]}"}
    compopt -o nospace 2>/dev/null
    COMPREPLY=($(compgen -W "$(
        command krgadm nodes 2>/dev/null | while IFS=: read -r id state; do
            [[ $state == $1 ]] && printf '%s%s\n' "$before" "$id"
        done
    )" -- "$cur"))
}

_krgadm() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local mode=${COMP_WORDS[1]} action=${COMP_WORDS[2]}
    COMPREPLY=()
    case $prev in
    -n | --nodes)
        case $action in
        add) _krgadm_ids present ;;
        del) _krgadm_ids online ;;
        *) _krgadm_ids '*' ;;
        esac
        return
        ;;
    -c | --count | -t | --total | -T | --timeout)
        return
        ;;
    esac
    local words=
    if ((COMP_CWORD == 1)); then
        words='cluster nodes --help --version'
    elif ((COMP_CWORD == 2)); then
        case $mode in
        cluster) words='status poweroff reboot --json' ;;
        nodes) words='status add del --json' ;;
        esac
    else
        case $mode:$action in
        cluster:*) words='--json' ;;
        nodes:add) words='-n --nodes -c --count -t --total -a --all --timeout --json' ;;
        nodes:del) words='-n --nodes -c --count -t --total -a --all --json' ;;
        nodes:status) words='-n --nodes --json' ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}

complete -F _krgadm krgadm
