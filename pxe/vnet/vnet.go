// Package vnet is an Ethernet inside one process: the boot network of a trial,
// made without root and without touching the host's own network.
//
// A learning switch ([Switch]) joins ports. A QEMU guest is plugged in by a
// unix socket (`-netdev stream`, see stream.go), the head node by a TCP/IP
// stack that lives in this process ([Host], gVisor's netstack). The servers of
// the head listen on that stack exactly as they would on a real interface:
// [Network] gives them TCP listeners, UDP sockets that can broadcast, and the
// answer to IPv6 router solicitations. Tests cut cables and part the network
// with [Port.SetUp] and [Switch.Partition].
//
// Nothing here blocks on a slow port: queues are bounded, what does not fit is
// dropped and counted, as on a real switch. The package knows nothing of DHCP,
// boot files or QEMU's command line.
package vnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"krgimage/pxe/ra"
)

// Config describes a network. Only Head is needed.
type Config struct {
	// Head is the address of the head node with the length of its subnet, for
	// example 10.77.0.254/24.
	Head netip.Prefix
	// MAC of the head node; default 52:54:00:ff:00:fe.
	MAC net.HardwareAddr
	// Dir is where the sockets of the ports go when their paths fit (see
	// maxSocketPath); otherwise, and when Dir is empty, they go to a new
	// directory under the user's runtime directory, which Close removes.
	Dir string
	// Capture receives every frame that enters the switch, as a pcap stream.
	Capture io.Writer
	// Queue is the length of a port's output queue in frames; default 4096.
	Queue int
	Log   *slog.Logger
}

// Network is a switch with the head node on it. Make one with New, plug guests
// in with Plug, end it with Close.
type Network struct {
	*Switch
	head *Host
	cfg  Config
	log  *slog.Logger

	dir     string // of the sockets
	ownDir  bool   // dir is ours to remove
	ctx     context.Context
	cancel  context.CancelFunc
	group   *errgroup.Group
	closing sync.Once

	mu    sync.Mutex
	socks map[string]string // port name to socket path; guarded by mu
}

// defaultMAC is the head node's Ethernet address unless Config says otherwise.
var defaultMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0xff, 0x00, 0xfe}

// New makes a network with nothing but the head node on it.
func New(cfg Config) (*Network, error) {
	if !cfg.Head.IsValid() || !cfg.Head.Addr().Is4() {
		return nil, fmt.Errorf("virtual network: the head's address %q is not an IPv4 address with a prefix length", cfg.Head)
	}
	if cfg.MAC == nil {
		cfg.MAC = defaultMAC
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	n := &Network{
		Switch: NewSwitch(cfg.Queue),
		cfg:    cfg,
		log:    cfg.Log.With("component", "vnet"),
		socks:  map[string]string{},
	}
	if cfg.Capture != nil {
		if err := n.Capture(cfg.Capture); err != nil {
			return nil, fmt.Errorf("virtual network: start the capture: %w", err)
		}
	}
	var err error
	if n.dir, n.ownDir, err = SocketDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("virtual network: directory of the port sockets: %w", err)
	}
	port, err := n.Attach("head")
	if err == nil {
		n.head, err = NewHost(port, cfg.MAC, cfg.Head)
	}
	if err != nil {
		n.removeDir()
		return nil, err
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.group, n.ctx = errgroup.WithContext(n.ctx)
	return n, nil
}

// Head is the head node's TCP/IP stack.
func (n *Network) Head() *Host { return n.head }

// Addr is the head node's address.
func (n *Network) Addr() netip.Addr { return n.cfg.Head.Addr() }

// ListenTCP listens on the head's address.
func (n *Network) ListenTCP(port int) (net.Listener, error) { return n.head.ListenTCP(port) }

// ListenUDP opens a UDP socket on the head's address that also receives and
// sends broadcasts. Port 0 takes a free one.
func (n *Network) ListenUDP(port int) (net.PacketConn, error) { return n.head.ListenUDP(port) }

// DialTCP connects from the head node to a guest.
func (n *Network) DialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	return n.head.DialTCP(ctx, addr)
}

// Plug adds a port and returns the path of the unix socket that QEMU connects
// to: `-netdev stream,id=n0,server=off,addr.type=unix,addr.path=PATH`. One
// connection at a time is served; the next one takes over when it ends, so a
// restarted QEMU finds its port again. A second Plug of the same name returns
// the same path.
func (n *Network) Plug(name string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if path, ok := n.socks[name]; ok {
		return path, nil
	}
	if name == "" || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("virtual network: %q can't name a port", name)
	}
	path := filepath.Join(n.dir, name+".sock")
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("virtual network: the socket path %s is longer than %d bytes; choose a shorter port name or runtime directory", path, maxSocketPath)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("virtual network: port %s: %w", name, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return "", fmt.Errorf("virtual network: port %s: %w", name, err)
	}
	port, err := n.Attach(name)
	if err != nil {
		l.Close()
		return "", err
	}
	n.socks[name] = path
	n.group.Go(func() error {
		port.serve(n.ctx, l, n.log.With("port", name))
		return nil
	})
	return path, nil
}

// RouterAdvertisements answers router solicitations with an empty
// advertisement until ctx ends. Without an answer iPXE waits some 13 s after
// DHCP for a router that will never speak.
func (n *Network) RouterAdvertisements(ctx context.Context) error {
	port, err := n.Attach("router")
	if err != nil {
		return err
	}
	defer n.Detach(port)
	for {
		frame, err := port.Receive(ctx)
		if err != nil {
			return nil
		}
		if answer := ra.Reply(frame, n.cfg.MAC); answer != nil {
			// Sent by the head's own port: the switch must not learn that the
			// head lives on this one.
			n.head.port.Send(answer)
		}
	}
}

// Close takes the network down: listeners and connections of the head end,
// sockets disappear.
func (n *Network) Close() error {
	n.closing.Do(func() {
		n.cancel()
		n.group.Wait()
		n.head.Close()
		n.Switch.close()
		n.removeDir()
	})
	return nil
}

func (n *Network) removeDir() {
	if n.ownDir {
		os.RemoveAll(n.dir)
	}
}

// maxSocketPath is the longest path of a unix socket: sun_path has 108 bytes
// with the terminating zero (unix(7)).
const maxSocketPath = 107

// SocketDir returns dir when a socket with an ordinary name fits into it,
// otherwise a new private directory with a short path; own says that the caller
// has to remove it.
func SocketDir(dir string) (path string, own bool, err error) {
	const nameRoom = len("/node255.console.sock")
	if dir != "" {
		if dir, err = filepath.Abs(dir); err != nil {
			return "", false, err
		}
		if len(dir)+nameRoom <= maxSocketPath {
			return dir, false, os.MkdirAll(dir, 0o700)
		}
	}
	for _, base := range []string{os.Getenv("XDG_RUNTIME_DIR"), os.TempDir()} {
		if base == "" || len(base)+len("/krgimage-1234567890")+nameRoom > maxSocketPath {
			continue
		}
		if path, err = os.MkdirTemp(base, "krgimage-"); err == nil {
			return path, true, nil
		}
	}
	if err == nil {
		err = errors.New("no directory with a short enough path; set XDG_RUNTIME_DIR to one")
	}
	return "", false, err
}
