package stage1

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/cmdline"
	"krgimage/node/lease"
	"krgimage/node/nfsclient"
	"krgimage/node/retry"
	"krgimage/node/settings"
)

// nfsPort is where a server listens when nobody says otherwise.
const nfsPort = 2049

// source says where the root is.
type source struct {
	server  netip.Addr
	path    string
	port    int // of NFS
	mount   int // port of MOUNT; 0: ask the server's portmapper
	options []string
	flags   uintptr
}

func (s source) String() string { return s.server.String() + ":" + s.path }

// errNoRoot says that nobody told the node where its root is.
var errNoRoot = errors.New("neither the kernel command line nor the head says where the root is")

// rootSource decides where the root is: the command line's nfsroot= first, as
// in Kerrighed, then the head's settings, then DHCP's root path. The server
// may be left out of nfsroot= and is DHCP's next server then.
func rootSource(c cmdline.NFSRoot, s *settings.Settings, l lease.Lease) (source, error) {
	src := source{port: nfsPort, mount: nfsPort}
	server := c.Server
	switch {
	case c.Path != "":
		src.path = c.Path
	case s != nil && s.NFS.Path != "":
		src.path, server = s.NFS.Path, s.NFS.Server
		if s.NFS.Port != 0 {
			src.port, src.mount = s.NFS.Port, s.NFS.Port
		}
	case strings.Contains(l.RootPath, "/"):
		c = cmdline.Parse("nfsroot=" + l.RootPath).NFSRoot
		src.path, server = c.Path, c.Server
	}
	if src.path == "" {
		return source{}, errNoRoot
	}
	switch {
	case server != "":
		a, err := netip.ParseAddr(server)
		if err != nil || !a.Is4() {
			return source{}, fmt.Errorf("root server %q is not an IPv4 address", server)
		}
		src.server = a
	case l.Next.IsValid():
		src.server = l.Next
	default:
		src.server = l.Server
	}
	mountGiven := false
	for _, o := range c.Options {
		name, value, _ := strings.Cut(o, "=")
		switch name {
		case "port", "mountport":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 65535 {
				return source{}, fmt.Errorf("nfsroot option %s: want a port number", o)
			}
			if name == "mountport" {
				src.mount, mountGiven = n, true
				continue
			}
			src.port = n
			if !mountGiven {
				src.mount = n
			}
		case "rw", "ro": // the container always writes, the host part never does
		case "noatime":
			src.flags |= unix.MS_NOATIME
		case "nodiratime":
			src.flags |= unix.MS_NODIRATIME
		default:
			src.options = append(src.options, o)
		}
	}
	return src, nil
}

// data is the option string of mount(2); what nfsroot= says wins.
func (s source) data() string {
	m := nfsclient.Mount{Server: s.server, Path: s.path, Port: s.port, MountPort: s.mount, Options: s.options}
	return m.Data()
}

// dialTimeout bounds the look whether anything listens: the kernel's own
// mount(2) would be silent for minutes.
const dialTimeout = 5 * time.Second

// mountRoot mounts src at dir and tries for ever, saying so each time.
func mountRoot(ctx context.Context, log *slog.Logger, src source, dir string) error {
	wait := retry.Backoff{Min: time.Second, Max: 15 * time.Second, Jitter: 0.5}
	return retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, attempt int) error {
		target := netip.AddrPortFrom(src.server, uint16(src.port)).String()
		conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp4", target)
		if err != nil {
			return err
		}
		conn.Close()
		err = mountNFS(ctx, log, src, dir)
		if err == nil || src.mount != src.port {
			return err
		}
		// A kernel server has its MOUNT service elsewhere.
		other := src
		other.mount = 0
		if mountNFS(ctx, log, other, dir) == nil {
			return nil
		}
		return err
	}, func(err error, wait time.Duration) {
		log.Warn("the root doesn't mount; trying again", "server", src.server, "path", src.path, "port", src.port, "err", err, "again_in", wait.Round(100*time.Millisecond))
	})
}

// mountNFS is mount(2) with a word on the console while it hangs.
func mountNFS(ctx context.Context, log *slog.Logger, src source, dir string) error {
	done := make(chan error, 1)
	go func() { done <- unix.Mount(src.String(), dir, "nfs", src.flags, src.data()) }()
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("mount %s: %w", src, err)
			}
			return nil
		case <-tick.C:
			log.Warn("the root server takes its time to answer MOUNT", "server", src.server, "path", src.path)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
