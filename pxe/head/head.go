// Package head is the head node: DHCP, TFTP, HTTP, NFS, the answer to IPv6 router
// solicitations and the cluster service, in one process under one context.
//
//	firmware ─ DHCP ─ TFTP (loader) ─ HTTP (script, kernel, initramfs) ─ stage 1 ─ HTTP (settings, stages) ─ NFS (root)
//
// All services listen on a Network: a real interface (OpenLink), or the virtual
// network of a trial. Run opens every socket first, so that a port that is taken
// or a privilege that is missing is said before a single packet is answered;
// then it makes sure that no other DHCP server is there; then it serves until
// its context ends.
//
// What the machines do is in the node registry. The process itself reads it by
// Head.Nodes, other commands by the control socket (control.go, Dial).
package head

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"krgimage/configs"
	"krgimage/pxe/dhcp"
	"krgimage/pxe/httpboot"
	"krgimage/pxe/nodes"
	"krgimage/pxe/tftp"
)

// Network is where the services listen.
type Network interface {
	// ListenTCP listens on the head's address.
	ListenTCP(port int) (net.Listener, error)
	// ListenUDP receives what is sent to the port, broadcasts included, and can
	// send broadcasts.
	ListenUDP(port int) (net.PacketConn, error)
	// DialTCP connects from the head's address.
	DialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// RouterAdvertisements answers IPv6 router solicitations until ctx ends. An
	// error is a loss of speed, not of function.
	RouterAdvertisements(ctx context.Context) error
}

// foreignFinder is a Network on which others may serve DHCP too.
type foreignFinder interface {
	// FindForeignDHCP returns a *dhcp.ForeignServerError if another server than
	// own answers.
	FindForeignDHCP(ctx context.Context, own netip.Addr) error
}

// NFS is the server of the nodes' root.
type NFS interface {
	Serve(ctx context.Context, l net.Listener) error
}

// Image is what the nodes boot.
type Image struct {
	Kernel    string // path of vmlinuz
	Initramfs string // path of initramfs.img
	LoaderDir string // directory with undionly.kpxe, ipxe.pxe, snponly.efi, pxelinux.0, ldlinux.c32
}

// Config is what a Head works from.
type Config struct {
	Cluster  configs.Cluster
	Image    Image
	NFS      NFS              // nil: another program or machine serves the root
	Locks    Locks            // the lock manager of NFS; nil: none is served
	Root     httpboot.Root    // where the root is; the zero value is "/" of NFS
	Mounts   []httpboot.Mount // what nodes mount besides it
	NFSStats func() any       // what GET /v1/nfs on the control socket answers, as JSON; nil: no such thing
	Metrics  http.Handler     // GET /metrics on the control socket; nil: no such thing
	StateDir string           // the registry and the control socket are in StateDir/head
	Network  Network
	Force    bool         // serve even if another DHCP server answers
	Log      *slog.Logger // nil: silent
}

// Ports of the protocols that have no setting.
const (
	portDHCP = 67
	portTFTP = 69
)

// Head is a head node. Make one with New.
type Head struct {
	cfg    Config
	log    *slog.Logger
	nodes  *nodes.Registry
	health health

	members atomic.Pointer[members] // nil before Run has opened them
}

// Run is New and Head.Run in one.
func Run(ctx context.Context, cfg Config, onReady func()) error {
	h, err := New(cfg)
	if err != nil {
		return err
	}
	return h.Run(ctx, onReady)
}

// New checks the image and reads the node file.
func New(cfg Config) (*Head, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if !cfg.Root.Server.IsValid() {
		cfg.Root = httpboot.HeadRoot(&cfg.Cluster, "/")
	}
	if err := cfg.Image.check(cfg.Cluster.Boot); err != nil {
		return nil, err
	}
	registry, err := nodes.Open(nodes.Config{
		Cluster: cfg.Cluster,
		File:    filepath.Join(cfg.StateDir, "head", "nodes.json"),
		Log:     cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	return &Head{cfg: cfg, log: cfg.Log.With("component", "head"), nodes: registry}, nil
}

// Nodes is the node registry.
func (h *Head) Nodes() *nodes.Registry { return h.nodes }

// service is one part of the head under Run.
type service struct {
	name string
	run  func(context.Context) error
	// optional: its end is a warning, not the end of the head
	optional bool
}

// Run serves until ctx ends; then it returns nil when everything is closed and
// written. It calls onReady (if not nil) once all services listen. The first
// service that fails ends the others, and its error is returned.
func (h *Head) Run(ctx context.Context, onReady func()) error {
	services, closeAll, err := h.listen(ctx)
	if err != nil {
		closeAll()
		return err
	}
	if err := h.findForeign(ctx); err != nil {
		closeAll()
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range services {
		h.health.up(s.name)
		group.Go(func() error {
			err := s.run(ctx)
			h.health.down(s.name, err)
			switch {
			case ctx.Err() != nil && (err == nil || errors.Is(err, ctx.Err()) || errors.Is(err, net.ErrClosed)):
				return nil
			case s.optional && err != nil:
				h.log.Warn(s.name+" is not available", "err", err)
				return nil
			case err == nil && !s.optional:
				err = errors.New("ended by itself")
			}
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			return nil
		})
	}
	h.log.Info("head node serves", "cluster", h.cfg.Cluster.Name, "address", h.cfg.Cluster.Network.Head, "subnet", h.cfg.Cluster.Network.Subnet)
	if onReady != nil {
		onReady()
	}
	err = group.Wait()
	closeAll()
	h.log.Info("head node stopped")
	return err
}

// listen opens every socket. The returned function closes what is open; it may
// be called at any time.
func (h *Head) listen(ctx context.Context) (services []service, closeAll func(), err error) {
	var open []io.Closer
	closeAll = func() {
		for _, c := range slices.Backward(open) {
			c.Close()
		}
	}
	c, network := &h.cfg.Cluster, h.cfg.Network

	control, err := listenControl(filepath.Join(h.cfg.StateDir, "head"))
	if err != nil {
		return nil, closeAll, err
	}
	open = append(open, control)
	dhcpConn, err := network.ListenUDP(portDHCP)
	if err != nil {
		return nil, closeAll, fmt.Errorf("DHCP: %w", err)
	}
	open = append(open, dhcpConn)
	tftpConn, err := network.ListenUDP(portTFTP)
	if err != nil {
		return nil, closeAll, fmt.Errorf("TFTP: %w", err)
	}
	open = append(open, tftpConn)
	web, err := network.ListenTCP(c.Network.HTTPPort)
	if err != nil {
		return nil, closeAll, fmt.Errorf("HTTP (network.http_port): %w", err)
	}
	open = append(open, web)

	inside := func(l net.Listener) net.Listener { return subnetListener{l, c.Network.Subnet, h.log} }
	clusterListener, err := network.ListenTCP(c.Network.ClusterPort)
	if err != nil {
		return nil, closeAll, fmt.Errorf("cluster service (network.cluster_port): %w", err)
	}
	open = append(open, clusterListener)
	m, err := h.openMembers(ctx)
	if err != nil {
		return nil, closeAll, err
	}
	open = append(open, m)
	h.members.Store(m)

	dhcpServer := dhcp.New(dhcp.Config{Cluster: *c, Nodes: h.nodes, Root: h.cfg.Root.String(), Log: h.cfg.Log})
	tftpServer := h.tftp()
	webServer := httpboot.New(httpboot.Config{
		Cluster: *c, Nodes: h.nodes, Admission: m.desk, Log: h.cfg.Log, Root: h.cfg.Root, Mounts: h.cfg.Mounts,
		Kernel: h.cfg.Image.Kernel, Initramfs: h.cfg.Image.Initramfs, Loaders: h.cfg.Image.loaders(),
	})
	services = []service{
		{name: "nodes", run: h.nodes.Run},
		{name: "tftp", run: func(ctx context.Context) error { return tftpServer.Serve(ctx, tftpConn) }},
		{name: "http", run: func(ctx context.Context) error { return webServer.Serve(ctx, web) }},
	}
	if h.cfg.NFS != nil {
		l, err := network.ListenTCP(c.Network.NFSPort)
		if err != nil {
			return nil, closeAll, fmt.Errorf("NFS (network.nfs_port): %w", err)
		}
		open = append(open, l)
		services = append(services, service{name: "nfs", run: func(ctx context.Context) error { return h.cfg.NFS.Serve(ctx, inside(l)) }})
	}
	if h.cfg.Locks != nil {
		lockServices, sockets, err := h.listenLocks()
		open = append(open, sockets...)
		if err != nil {
			return nil, closeAll, err
		}
		services = append(services, lockServices...)
	}
	services = append(services, m.services(inside(clusterListener))...)
	services = append(services,
		service{name: "ra", run: network.RouterAdvertisements, optional: true},
		// DHCP last: it invites the nodes.
		service{name: "dhcp", run: func(ctx context.Context) error { return dhcpServer.Serve(ctx, dhcpConn) }},
		service{name: "control", run: func(ctx context.Context) error { return h.serveControl(ctx, control) }},
	)
	return services, closeAll, nil
}

// findForeign refuses to serve beside another DHCP server.
func (h *Head) findForeign(ctx context.Context) error {
	finder, ok := h.cfg.Network.(foreignFinder)
	if !ok {
		return nil
	}
	h.log.Info("looking for another DHCP server on the link", "seconds", dhcp.ForeignWait.Seconds())
	err := finder.FindForeignDHCP(ctx, h.cfg.Cluster.Network.Head)
	foreign := (*dhcp.ForeignServerError)(nil)
	if h.cfg.Force && errors.As(err, &foreign) {
		h.log.Warn("serving beside another DHCP server, as told: nodes may get its answers", "server", foreign.Server, "interface", foreign.Interface)
		return nil
	}
	return err
}

// tftp is the TFTP server with its table of files.
func (h *Head) tftp() *tftp.Server {
	c := &h.cfg.Cluster
	config := func(n nodes.Node, ok bool) ([]byte, bool) {
		return []byte(httpboot.PXELinuxConfig(c, n, h.cfg.Root)), ok
	}
	table := &tftp.Table{
		Files: map[string]tftp.File{
			"vmlinuz":       {Path: h.cfg.Image.Kernel, Stage: nodes.StageKernel},
			"initramfs.img": {Path: h.cfg.Image.Initramfs, Stage: nodes.StageInitramfs},
		},
		PXELinux:        func(mac configs.MAC) ([]byte, bool) { return config(h.nodes.Lookup(mac)) },
		PXELinuxDefault: func(client netip.Addr) ([]byte, bool) { return config(h.nodes.ByAddress(client)) },
	}
	for name, path := range h.cfg.Image.loaders() {
		f := tftp.File{Path: path}
		if !strings.HasSuffix(name, ".c32") {
			f.Stage = nodes.StageLoader
		}
		table.Files[name] = f
	}
	return tftp.New(tftp.Config{
		Lookup: table.Lookup,
		Allow:  c.Network.Subnet.Contains,
		Done: func(t tftp.Transfer) {
			if n, ok := h.nodes.ByAddress(t.Client); ok && t.Stage != "" {
				h.nodes.Saw(n.MAC, t.Stage, t.Name)
			}
		},
		Log: h.cfg.Log,
	})
}

// loaderNames are the files of an image's LoaderDir that are served.
var loaderNames = []string{dhcp.LoaderBIOS, dhcp.LoaderBIOSFull, dhcp.LoaderEFI, dhcp.LoaderPXELinux, "ldlinux.c32"}

// loaders are the loaders that the image has, name to path.
func (i Image) loaders() map[string]string {
	have := map[string]string{}
	for _, name := range loaderNames {
		path := filepath.Join(i.LoaderDir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			have[name] = path
		}
	}
	return have
}

// check says what of the image is missing.
func (i Image) check(boot configs.Boot) error {
	need := []string{i.Kernel, i.Initramfs, filepath.Join(i.LoaderDir, dhcp.LoaderEFI)}
	if boot.BIOS == "pxelinux" {
		need = append(need, filepath.Join(i.LoaderDir, dhcp.LoaderPXELinux), filepath.Join(i.LoaderDir, "ldlinux.c32"))
	} else {
		need = append(need, filepath.Join(i.LoaderDir, dhcp.LoaderBIOS), filepath.Join(i.LoaderDir, dhcp.LoaderBIOSFull))
	}
	for _, path := range need {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("boot image: %w. Build it with krgimage build", err)
		}
		info, err := f.Stat()
		f.Close()
		if err != nil {
			return fmt.Errorf("boot image: %w", err)
		}
		if !info.Mode().IsRegular() || info.Size() == 0 {
			return fmt.Errorf("boot image: %s is empty or not a file. Build it with krgimage build", path)
		}
	}
	return nil
}

// subnetListener drops connections from outside the cluster's subnet.
type subnetListener struct {
	net.Listener
	subnet netip.Prefix
	log    *slog.Logger
}

func (l subnetListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if a, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil && l.subnet.Contains(a.Addr().Unmap()) {
			return conn, nil
		}
		l.log.Warn("connection from outside the cluster's subnet dropped", "from", conn.RemoteAddr())
		conn.Close()
	}
}
