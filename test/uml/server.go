package uml

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nfs"
	"krgimage/nfsroot/nlm"
	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// lockGrace is how long clients may reclaim locks after RestartMachine.
const lockGrace = 10 * time.Second

// Port is where the servers of this package listen.
const Port = 2049

// Serve runs an NFS server in this process, at Port of the namespace, until the
// test ends.
func (n *Net) Serve(t testing.TB, cfg nfs.Config) *nfs.Server {
	t.Helper()
	s, err := nfs.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l := n.Listen(t, Port)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("NFS server: %v", err)
		}
		s.Close()
	})
	return s
}

// Server is an NFS server with its lock manager in a process of its own, which
// can be killed and started again. Its handle key is kept in the state directory, as the head's.
type Server struct {
	net    *Net
	config serverConfig
	cmd    *exec.Cmd
	log    *console
}

type serverConfig struct {
	Addr    string
	State   string // directory
	BootID  string // of the machine that the server pretends to be
	Exports []nfs.Export
}

// StartServer starts one at Port.
func (n *Net) StartServer(t testing.TB, state string, exports ...nfs.Export) *Server {
	t.Helper()
	s := &Server{net: n, log: &console{}, config: serverConfig{
		Addr: netip.AddrPortFrom(n.Addr, Port).String(), State: state, Exports: exports,
	}}
	s.Start(t)
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() && s.log.len() > 0 {
			t.Logf("log of the NFS server:\n%s", s.log)
		}
	})
	return s
}

// Start starts the server again after Kill and waits until it listens.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if err := s.start(t.Context()); err != nil {
		t.Fatalf("NFS server: %v\n%s", err, s.log)
	}
}

// Restart kills the server as a crash does and starts it again. For goroutines
// other than the test's.
func (s *Server) Restart(ctx context.Context) error {
	s.Kill()
	return s.start(ctx)
}

func (s *Server) start(ctx context.Context) error {
	config, err := json.Marshal(s.config)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s.cmd = &exec.Cmd{
		Path: self, Args: []string{roleServer, string(config)},
		Stdout: w, Stderr: s.log,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
	}
	err = s.net.Do(s.cmd.Start)
	w.Close()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { r.Close() })()
	if n, err := r.Read(make([]byte, 16)); n == 0 {
		return fmt.Errorf("it doesn't come up: %w", err)
	}
	return nil
}

// RestartMachine is Restart of a server that finds that its machine went down,
// too.
func (s *Server) RestartMachine(ctx context.Context) error {
	s.config.BootID += "again"
	return s.Restart(ctx)
}

// Kill ends the server with SIGKILL and waits for its end.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// serverMain is the server process. It prints a line when it listens.
func serverMain(args []string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if err := serve(args[0], log); err != nil {
		log.Error("end of the server", "err", err)
		return 1
	}
	return 0
}

func serve(config string, log *slog.Logger) error {
	var cfg serverConfig
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	key, err := nfs.LoadKey(filepath.Join(cfg.State, "nfs.key"))
	if err != nil {
		return err
	}
	s, err := nfs.New(nfs.Config{Exports: cfg.Exports, HandleKey: key, Log: log, PrivilegedPorts: true, ReplayLog: filepath.Join(cfg.State, "replays")})
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := net.Listen("tcp4", cfg.Addr)
	if err != nil {
		return err
	}
	addr, err := netip.ParseAddrPort(cfg.Addr)
	if err != nil {
		return err
	}
	locks, err := nlm.New(nlm.Config{
		Files: s, Journal: filepath.Join(cfg.State, "locks"), BootID: "boot" + cfg.BootID,
		Name: addr.Addr().String(), Dial: sunrpc.DialFrom(addr.Addr()), Grace: lockGrace, Log: log,
	})
	if err != nil {
		return err
	}
	defer locks.Close()
	ll, err := net.Listen("tcp4", netip.AddrPortFrom(addr.Addr(), rpcbind.Port).String())
	if err != nil {
		return err
	}
	directory := &rpcbind.Registry{}
	for _, e := range nlm.Entries(rpcbind.Port, "tcp") {
		directory.Set(e)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	fmt.Println("listening")
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.Serve(ctx, l) })
	group.Go(func() error { return locks.Serve(ctx, ll, nil, directory) })
	return group.Wait()
}
