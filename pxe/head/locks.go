package head

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/nfsroot/nlm"
	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// Locks is the lock manager of the nodes' root.
type Locks interface {
	// Serve answers on a listener and, if there is one, a datagram socket; the
	// directory is served there, too, unless it is nil.
	Serve(ctx context.Context, tcp net.Listener, udp net.PacketConn, directory *rpcbind.Registry) error
	// ReleaseClient frees all locks of a node that is dead or started anew.
	ReleaseClient(netip.Addr) int
}

// registrar is a Network on a machine that has an rpcbind of its own.
type registrar interface {
	RegisterRPC(ctx context.Context, entries []rpcbind.Entry) (unregister func(context.Context) error, err error)
}

// registerTimeout bounds what this machine's rpcbind takes to answer.
const registerTimeout = 10 * time.Second

// listenLocks opens the sockets of the lock manager: rpcbind's port, on which it
// is found and serves at once. Where this machine's own rpcbind has that port,
// any port will do, and rpcbind is told which.
func (h *Head) listenLocks() (services []service, open []io.Closer, err error) {
	network := h.cfg.Network
	tcp, err := network.ListenTCP(rpcbind.Port)
	host, hasOwn := network.(registrar)
	if errors.Is(err, unix.EADDRINUSE) && hasOwn {
		return h.registerLocks(host)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("file locks (rpcbind): %w", err)
	}
	open = append(open, tcp)
	udp, err := network.ListenUDP(rpcbind.Port)
	if err != nil { // Linux clients ask by TCP
		h.log.Warn("rpcbind does not answer by UDP", "err", err)
		udp = nil
	} else {
		open = append(open, udp)
		udp = subnetPackets{udp, h.cfg.Cluster.Network.Subnet}
	}
	directory := &rpcbind.Registry{}
	for _, n := range []string{"tcp", "udp"} {
		for vers := uint32(2); vers <= 4; vers++ {
			directory.Set(rpcbind.Entry{Prog: sunrpc.ProgramRPCBind, Vers: vers, Net: n, Port: rpcbind.Port})
		}
	}
	for _, e := range nlm.Entries(rpcbind.Port, "tcp", "udp") {
		directory.Set(e)
	}
	if h.cfg.NFS != nil {
		for _, prog := range []uint32{sunrpc.ProgramNFS, sunrpc.ProgramMount} {
			directory.Set(rpcbind.Entry{Prog: prog, Vers: 3, Net: "tcp", Port: uint16(h.cfg.Cluster.Network.NFSPort)})
		}
	}
	return h.lockServices(tcp, udp, directory), open, nil
}

// registerLocks is listenLocks beside this machine's own rpcbind.
func (h *Head) registerLocks(host registrar) (services []service, open []io.Closer, err error) {
	tcp, err := h.cfg.Network.ListenTCP(0)
	if err != nil {
		return nil, nil, fmt.Errorf("file locks: %w", err)
	}
	open = append(open, tcp)
	ctx, cancel := context.WithTimeout(context.Background(), registerTimeout)
	defer cancel()
	port := uint16(tcp.Addr().(*net.TCPAddr).Port)
	for _, e := range nlm.Entries(port, "tcp") {
		unregister, err := host.RegisterRPC(ctx, []rpcbind.Entry{e})
		switch {
		case err == nil:
			open = append(open, closer(func() error {
				ctx, cancel := context.WithTimeout(context.Background(), registerTimeout)
				defer cancel()
				return unregister(ctx)
			}))
		case e.Prog == sunrpc.ProgramNSM && errors.Is(err, rpcbind.ErrTaken):
			// rpc.statd of this machine hears of nodes that come up; they tell
			// the lock manager itself, too.
			h.log.Info("this machine's own status monitor stays registered")
		case errors.Is(err, rpcbind.ErrTaken):
			return nil, open, fmt.Errorf("file locks: this machine serves NFS locks of its own, and there can be but one lock manager. Stop its NFS server and unmount what it has mounted by NFS (systemctl stop nfs-server rpc-statd rpcbind rpcbind.socket): %w", err)
		default:
			return nil, open, fmt.Errorf("file locks: TCP port %d is taken, but not by an rpcbind that can be used. Find it with\n  ss -lnp 'sport = :%d'\nand stop it: %w", rpcbind.Port, rpcbind.Port, err)
		}
	}
	h.log.Info("file locks: using this machine's own rpcbind", "port", port)
	return h.lockServices(tcp, nil, nil), open, nil
}

type closer func() error

func (c closer) Close() error { return c() }

func (h *Head) lockServices(tcp net.Listener, udp net.PacketConn, directory *rpcbind.Registry) []service {
	inside := subnetListener{tcp, h.cfg.Cluster.Network.Subnet, h.log}
	return []service{
		{name: "locks", run: func(ctx context.Context) error { return h.cfg.Locks.Serve(ctx, inside, udp, directory) }},
		{name: "lock release", run: h.releaseLocks, optional: true},
	}
}

// releaseLocks frees the locks of nodes whose firmware asks for an address:
// nothing of what ran there is left.
func (h *Head) releaseLocks(ctx context.Context) error {
	start := time.Now()
	boots := map[configs.MAC]time.Time{}
	for n := range h.nodes.Watch(ctx) {
		if n.Boot == nil {
			continue
		}
		last, seen := boots[n.MAC]
		if !seen {
			last = start // older boots are over: what the node holds now came after
		}
		if n.Boot.Started.After(last) {
			h.cfg.Locks.ReleaseClient(n.Address)
			last = n.Boot.Started
		}
		boots[n.MAC] = last
	}
	return ctx.Err()
}

// subnetPackets drops datagrams from outside the cluster's subnet.
type subnetPackets struct {
	net.PacketConn
	subnet netip.Prefix
}

func (c subnetPackets) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := c.PacketConn.ReadFrom(b)
		if err != nil {
			return n, from, err
		}
		if a, err := netip.ParseAddrPort(from.String()); err == nil && c.subnet.Contains(a.Addr().Unmap()) {
			return n, from, nil
		}
	}
}
