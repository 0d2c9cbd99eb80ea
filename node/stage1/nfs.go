package stage1

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/node/cmdline"
	"krgimage/node/lease"
	"krgimage/node/nfsclient"
	"krgimage/node/settings"
)

// nfsPort is where a server listens when nobody says otherwise.
const nfsPort = 2049

// errNoRoot says that nobody told the node where its root is.
var errNoRoot = errors.New("neither the kernel command line nor the head says where the root is")

// rootSource decides where the root is: the command line's nfsroot= first, as
// in Kerrighed, then the head's settings, then DHCP's root path. The server
// may be left out of nfsroot= and is DHCP's next server then.
func rootSource(c cmdline.NFSRoot, s *settings.Settings, l lease.Lease) (nfsclient.Mount, error) {
	src := nfsclient.Mount{Port: nfsPort, MountPort: nfsPort}
	server := c.Server
	switch {
	case c.Path != "":
		src.Path = c.Path
	case s != nil && s.NFS.Path != "":
		src.Path, server = s.NFS.Path, s.NFS.Server
		if s.NFS.Port != 0 {
			src.Port, src.MountPort = s.NFS.Port, s.NFS.Port
		}
		c.Options = s.NFS.Options
	case strings.Contains(l.RootPath, "/"):
		c = cmdline.Parse("nfsroot=" + l.RootPath).NFSRoot
		src.Path, server = c.Path, c.Server
	}
	if src.Path == "" {
		return nfsclient.Mount{}, errNoRoot
	}
	switch {
	case server != "":
		a, err := netip.ParseAddr(server)
		if err != nil || !a.Is4() {
			return nfsclient.Mount{}, fmt.Errorf("root server %q is not an IPv4 address", server)
		}
		src.Server = a
	case l.Next.IsValid():
		src.Server = l.Next
	default:
		src.Server = l.Server
	}
	mountGiven := false
	for _, o := range c.Options {
		name, value, _ := strings.Cut(o, "=")
		switch name {
		case "port", "mountport":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 65535 {
				return nfsclient.Mount{}, fmt.Errorf("nfsroot option %s: want a port number", o)
			}
			if name == "mountport" {
				src.MountPort, mountGiven = n, true
				continue
			}
			src.Port = n
			if !mountGiven {
				src.MountPort = n
			}
		case "rw", "ro", "lock": // the container always writes and locks, the host part never does
		case "noatime":
			src.Flags |= unix.MS_NOATIME
		case "nodiratime":
			src.Flags |= unix.MS_NODIRATIME
		default:
			src.Options = append(src.Options, o)
		}
	}
	return src, nil
}

// shares are the mounts of the directories that the head wants besides the
// root, from the server that the root came from and in the way it came.
func shares(log *slog.Logger, root nfsclient.Mount, head *settings.Settings) []settings.Share {
	var list []settings.Share
	if head == nil {
		return nil
	}
	for _, m := range head.Mounts {
		if head.NFS.Server != root.Server.String() {
			log.Warn("not mounted: the root is on another server than the head says", "path", m.Path, "at", m.At, "root", root.Server, "head_says", head.NFS.Server)
			continue
		}
		one := root
		one.Path = m.Path
		one.Flags |= unix.MS_NODEV
		if m.ReadOnly {
			one.Flags |= unix.MS_RDONLY
		}
		list = append(list, settings.Share{At: m.At, NFS: one})
	}
	return list
}
