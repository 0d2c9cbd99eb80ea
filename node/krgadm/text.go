package krgadm

import _ "embed"

// Completion completes krgadm in bash.
//
//go:embed krgadm.bash
var Completion []byte

// Man is the manual page, section 1 as Kerrighed had it.
//
//go:embed krgadm.1
var Man []byte

const usage = `Usage: krgadm [-h|--help] [--version]
  or:  krgadm cluster [status|poweroff|reboot] [--json]
  or:  krgadm nodes [status [-n|--nodes LIST]] [--json]
  or:  krgadm nodes {add|del} {-n|--nodes LIST | -c|--count N | -t|--total N | -a|--all} [--json]
`

const hint = "\nMore with 'krgadm --help'.\n"

const help = `
Show which nodes make up the cluster, and change that.

A node is in one of these states:
  possible          its id may exist, but no machine with it is running
  present           its machine runs and can be added
  online            it is in the cluster: users log in and programs run there
Possible nodes are not listed.

Cluster mode:
  status            print whether the cluster is up and on how many nodes (the default)
  poweroff          power all nodes off; every program in the cluster ends
  reboot            boot all nodes again; every program in the cluster ends

Nodes mode:
  status            print ID:STATE of each node (the default)
  add               bring nodes in; returns when all of them are online. Either all
                    of them come in or none.
  del               take nodes out; they stay present. Programs that can't go to
                    another node end there. A node taken out comes back with 'add',
                    or when it boots again.

Options:
  -n, --nodes LIST  these nodes, for example 2,3,6-10. 'add' waits for those that
                    aren't present yet.
  -c, --count N     N nodes: 'add' waits until so many are present, 'del' takes those
                    with the lowest ids
  -t, --total N     as many as make a cluster of N nodes
  -a, --all         'add': all nodes present; 'del': all but this one
  -T, --timeout T   'add' gives up waiting after T: seconds, or a time such as 2m30s
                    (default: wait for ever)
  -j, --json        print JSON

add, del, poweroff, and reboot are for root. 'del' never removes the node it
runs on.

Examples:
  krgadm cluster                     status: up on 3 nodes
  krgadm nodes                       1:online 2:online 3:present, a line each
  krgadm nodes add -n 3              add node 3, wait for it if need be
  krgadm nodes add --total 4 -T 5m   have four nodes within five minutes, or fail
  krgadm nodes del -n 2              take node 2 out, for instance to repair it
  krgadm nodes --json | jq -r '.[] | select(.state == "online").hostname'

Exit status: 0 done, 1 failed or wrong usage. A change that isn't needed, such as
adding a node that is online, is done.
`
