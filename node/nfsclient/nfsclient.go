// Package nfsclient is how a node mounts NFS: the options that the shared root
// is mounted with on every node, and the patience to do it. Stage 1 mounts the
// root without locks, for it has nobody yet who could take care of them; PID 1
// mounts it once more, with locks, for the container. Tests that put the Linux
// client to work against the server use the same options. What the options mean
// for programs is in docs/nfs.md.
package nfsclient

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Mount is a tree on a server.
type Mount struct {
	Server    netip.Addr `json:"server"` // IPv4
	Path      string     `json:"path"`
	Port      int        `json:"port"`                 // of NFS
	MountPort int        `json:"mount_port,omitempty"` // of MOUNT; 0: ask the server's portmapper
	Options   []string   `json:"options,omitempty"`    // besides the usual ones, over which they win
	Flags     uintptr    `json:"flags,omitempty"`      // of mount(2)
	Locks     bool       `json:"locks,omitempty"`      // flock and fcntl hold between the nodes
}

// options hold for every node's root. The last line is for coherence: a node
// asks for the attributes of a file whenever it needs them, trusts what it knows
// of a directory for a second, and never trusts that a name is missing.
var options = []string{
	"vers=3", "proto=tcp", "mountproto=tcp", "mountvers=3", "hard",
	"acregmin=0", "acregmax=0", "acdirmin=1", "acdirmax=1", "lookupcache=positive",
}

// String is the source of mount(2).
func (m Mount) String() string { return m.Server.String() + ":" + m.Path }

// Data is the option string of mount(2). There is no mount.nfs to resolve names
// or look up ports, so all is spelled out.
func (m Mount) Data() string {
	o := []string{
		"port=" + strconv.Itoa(m.Port), "addr=" + m.Server.String(), "mountaddr=" + m.Server.String(),
	}
	if m.MountPort != 0 {
		o = append(o, "mountport="+strconv.Itoa(m.MountPort))
	}
	// Without locks the kernel keeps them for itself, each node its own. The two
	// kinds don't share a page cache (nfs_compare_super in fs/nfs/super.c).
	lock := "nolock"
	if m.Locks {
		lock = "lock"
	}
	return strings.Join(slices.Concat(options, []string{lock}, o, m.Options), ",")
}

// WantsLocks says whether the options leave the locks to the server.
func (m Mount) WantsLocks() bool {
	return !slices.ContainsFunc(m.Options, func(o string) bool { return o == "nolock" || o == "local_lock=all" })
}
