// Package nfsclient says how a node mounts NFS: the options that the shared
// root is mounted with on every node. Stage 1 calls it, and so do the tests that
// put the Linux client to work against the server; it never mounts anything
// itself. What the options mean for programs is in docs/nfs.md.
package nfsclient

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Mount is a tree on a server.
type Mount struct {
	Server    netip.Addr // IPv4
	Path      string
	Port      int      // of NFS
	MountPort int      // of MOUNT; 0: ask the server's portmapper
	Options   []string // besides the usual ones, over which they win
}

// options hold for every node's root.
var options = []string{"vers=3", "proto=tcp", "mountproto=tcp", "mountvers=3", "nolock", "hard"}

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
	return strings.Join(slices.Concat(options, o, m.Options), ",")
}
