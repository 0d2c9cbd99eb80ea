// Package tftp is the head node's TFTP server: read-only, for the few files that
// firmware can load in no other way. That is the iPXE loader (everything large
// then comes by HTTP), and with boot.bios pxelinux also its modules, its
// configuration, the kernel and the initramfs.
//
// A client names a file and the Table says what it is. There is no way from a
// name to a path: only names in the table exist.
//
// The protocol is github.com/pin/tftp/v3, with a socket per transfer. That
// library opens these sockets on the host itself, so a connection of a network
// inside the process is bridged to it, see bridge.go.
package tftp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/pin/tftp/v3"

	"krgimage/pxe/nodes"
)

// File is what a name stands for: a path, or the bytes themselves.
type File struct {
	Path  string
	Data  []byte
	Stage nodes.Stage // the stage of the boot that a transfer of it completes; "": none
}

// Transfer is a file that a client received whole: it acknowledged the last
// block.
type Transfer struct {
	Client   netip.Addr
	Name     string
	Stage    nodes.Stage
	Bytes    int64
	Duration time.Duration
}

// Config is what a Server works from.
type Config struct {
	// Lookup says what a client's name stands for. The name has no leading
	// slashes.
	Lookup func(name string, client netip.Addr) (File, bool)
	// Allow says whether a client is served at all; nil: every one.
	Allow func(client netip.Addr) bool
	// Done is told of every complete transfer; nil: nobody is.
	Done func(Transfer)
	Log  *slog.Logger // nil: silent
}

const (
	// maxTransfers bounds the transfers under way. A cluster of 256 machines that
	// is switched on at once queues a little; firmware repeats its request.
	maxTransfers = 128
	// maxName bounds a file name in bytes: what fits in a request of 512 bytes.
	maxName = 255
	// blockSize is the largest block in bytes that fits a frame of 1500 with the
	// headers of IP, UDP and TFTP (20 + 8 + 4).
	blockSize = 1468
	// A lost packet is sent again after a second, five times.
	packetTimeout = time.Second
	packetRetries = 5
	// stopGrace bounds the wait for transfers that are cut off at the end.
	stopGrace = 2 * time.Second
)

var (
	errBusy     = errors.New("server is busy, try again")
	errNotFound = errors.New("file not found")
	errRefused  = errors.New("not a node of this cluster")
)

// Server is a TFTP server.
type Server struct {
	cfg   Config
	log   *slog.Logger
	slots chan struct{} // one token per transfer under way
}

// New returns a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: cfg.Log.With("component", "tftp"), slots: make(chan struct{}, maxTransfers)}
}

// Serve answers on conn until ctx ends, and closes conn.
func (s *Server) Serve(ctx context.Context, conn net.PacketConn) error {
	if udp, ok := conn.(*net.UDPConn); ok {
		return s.serve(ctx, udp, func(a netip.AddrPort) (netip.Addr, bool) { return a.Addr(), true })
	}
	return s.bridge(ctx, conn)
}

// serve runs the library on a socket of the host. The function client says who
// is behind a remote address.
func (s *Server) serve(ctx context.Context, conn *net.UDPConn, client func(netip.AddrPort) (netip.Addr, bool)) error {
	server := tftp.NewServer(func(name string, out io.ReaderFrom) error {
		remote := out.(tftp.OutgoingTransfer).RemoteAddr()
		addr, ok := client(unmap(remote.AddrPort()))
		if !ok {
			return errRefused
		}
		return s.send(ctx, name, addr, out)
	}, nil)
	server.SetBlockSize(blockSize)
	server.SetTimeout(packetTimeout)
	server.SetRetries(packetRetries)

	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		server.Shutdown() // closes conn and waits for the transfers
		close(ended)
	})
	err := server.Serve(conn)
	if stop() {
		conn.Close()
		return fmt.Errorf("TFTP: %w", err)
	}
	select {
	case <-ended:
	case <-time.After(stopGrace): // a client that fell silent; its transfer ends with its retries
	}
	return nil
}

// send is one transfer.
func (s *Server) send(ctx context.Context, asked string, client netip.Addr, out io.ReaderFrom) error {
	start := time.Now()
	name := Name(asked)
	log := s.log.With("client", client, "file", nodes.Clean(name))
	if s.cfg.Allow != nil && !s.cfg.Allow(client) {
		log.Debug("refused: not a node of this cluster")
		return errRefused
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		log.Warn("refused: too many transfers at once")
		return errBusy
	}
	f, ok := s.cfg.Lookup(name, client)
	if !ok || len(name) > maxName {
		log.Debug("no such file") // pxelinux tries a dozen names
		return errNotFound
	}
	body, size, err := f.open()
	if err != nil {
		log.Error("boot file can't be read", "err", err)
		return errNotFound // the path is nobody else's business
	}
	defer body.Close()
	out.(tftp.OutgoingTransfer).SetSize(size)
	n, err := out.ReadFrom(&untilDone{ctx, body})
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		// Usual with UEFI firmware and pxelinux, which ask for the size first.
		log.Debug("transfer ended early", "bytes", n, "size", size, "err", err)
		return nil
	}
	t := Transfer{client, name, f.Stage, n, time.Since(start)}
	log.Debug("transferred", "bytes", n, "seconds", t.Duration.Seconds())
	if s.cfg.Done != nil {
		s.cfg.Done(t)
	}
	return nil
}

func (f File) open() (io.ReadCloser, int64, error) {
	if f.Path == "" {
		return io.NopCloser(bytes.NewReader(f.Data)), int64(len(f.Data)), nil
	}
	file, err := os.Open(f.Path)
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", f.Path)
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

// untilDone ends a transfer when the server stops. It hides the file's other
// methods from the library, which would move its offset.
type untilDone struct {
	ctx  context.Context
	body io.Reader
}

func (r *untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, errors.New("server is stopping")
	}
	return r.body.Read(p)
}

// Name is a client's file name as the Table knows it. Firmwares write it with
// leading slashes, and some with a backslash.
func Name(asked string) string {
	return strings.TrimLeft(strings.ReplaceAll(asked, `\`, "/"), "/")
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
