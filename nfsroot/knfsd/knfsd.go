// Package knfsd has the kernel's own NFS server serve the root, with the tools
// of Debian's nfs-kernel-server.
//
// Start goes these steps, and Close goes them backwards:
//
//	tools     exportfs, rpc.nfsd, rpc.mountd and rpc.statd must be there
//	nfsd      the kernel module, and its files in /proc/fs/nfsd
//	conflict  nobody else exports our directories
//	daemons   rpcbind, rpc.statd and rpc.mountd, those that don't run yet
//	exports   a file of our own in /etc/exports.d, and exportfs -i
//	threads   rpc.nfsd, unless it runs: version 3 over TCP only
//
// What runs already belongs to the admin and is used as it is: its threads,
// versions and other exports are never changed. What is ours is in a record
// first, so that a Start after a crash knows and takes over or removes it.
package knfsd

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
)

// ErrUnavailable says that this machine can't serve NFS with its kernel.
var ErrUnavailable = errors.New("the kernel's NFS server can't be used here")

// ErrConflict says that something of the admin's stands in the way.
var ErrConflict = errors.New("something else stands in the way")

// Export is a directory to serve.
type Export struct {
	Dir        string
	ReadOnly   bool
	RootSquash bool
}

// Config is what a Server is made of.
type Config struct {
	Name    string   // of the cluster; names our file in /etc/exports.d
	Exports []Export // paths are what nodes mount
	Clients []string // addresses and subnets that may mount them
	Port    int      // TCP port of NFS
	Record  string   // file that says what is ours
	System  System
	Log     *slog.Logger // nil: silent
}

// System is the machine. Real is the real one.
type System interface {
	// Run runs a program to its end and returns what it printed.
	Run(ctx context.Context, argv ...string) (string, error)
	// Daemon starts a program that stays; Close ends it.
	Daemon(argv ...string) (io.Closer, error)
	// Find says whether there is such a program.
	Find(program string) bool
	// Path is where a file of the machine is.
	Path(file string) string
	// Served asks the portmapper for the TCP port of a program; 0 if it knows
	// none, an error when there is no portmapper.
	Served(ctx context.Context, prog, vers uint32) (port int, err error)
	// Wait waits until ready says true.
	Wait(ctx context.Context, what string, ready func() bool) error
}

// Files of the kernel and of exportfs.
const (
	nfsdDir     = "/proc/fs/nfsd"
	exportsDir  = "/etc/exports.d"
	threadsFile = nfsdDir + "/threads"
	versFile    = nfsdDir + "/versions"
	portsFile   = nfsdDir + "/portlist"
)

// RPC programs (RFC 1833, RFC 1813) as the portmapper knows them.
const (
	progPortmap = 100000
	progMount   = 100005
	progStatus  = 100024
)

// threads is how many requests the kernel works on at once. A thread costs some
// kilobytes; 8, the kernel's default, is too few for a cluster that boots.
const threads = 64

// record is what is ours.
type record struct {
	Exports []string `json:"exports"` // CLIENT:DIR
	Threads bool     `json:"threads"` // we started nfsd
}

// Server is the kernel's server at work for us.
type Server struct {
	cfg     Config
	sys     System
	log     *slog.Logger
	rec     record
	daemons []io.Closer
}

// plainPath is a directory that exports(5) and a kernel command line take
// without quotes.
var plainPath = regexp.MustCompile(`^/[A-Za-z0-9._/@+-]*$`)

// Start has the kernel serve the exports.
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	s := &Server{cfg: cfg, sys: cfg.System, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.log = s.log.With("component", "knfsd")
	for _, e := range cfg.Exports {
		if !plainPath.MatchString(e.Dir) {
			return nil, fmt.Errorf("the kernel's NFS server can't export %q: its name needs quotes; move it (--state names the state directory)", e.Dir)
		}
	}
	if err := s.tools(); err != nil {
		return nil, err
	}
	if err := s.nfsd(ctx); err != nil {
		return nil, err
	}
	if err := s.takeOver(ctx); err != nil {
		return nil, err
	}
	if err := s.conflicts(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.startDaemons(ctx); err != nil {
		return nil, err
	}
	if err := s.export(ctx); err != nil {
		return nil, err
	}
	return s, s.startThreads(ctx)
}

func (s *Server) tools() error {
	for _, program := range []string{"exportfs", "rpc.nfsd", "rpc.mountd", "rpc.statd", "rpcbind"} {
		if !s.sys.Find(program) {
			return fmt.Errorf("%w: there is no %s. Install it:\n  apt-get install nfs-kernel-server", ErrUnavailable, program)
		}
	}
	return nil
}

// nfsd makes the kernel's side available.
func (s *Server) nfsd(ctx context.Context) error {
	if _, err := os.Stat(s.sys.Path(threadsFile)); err == nil {
		return nil
	}
	// It may be built in: then only the mount tells.
	_, modErr := s.sys.Run(ctx, "modprobe", "nfsd")
	_, err := s.sys.Run(ctx, "mount", "-t", "nfsd", "nfsd", nfsdDir)
	if err == nil {
		_, err = os.Stat(s.sys.Path(threadsFile))
	}
	if err != nil {
		return fmt.Errorf("%w: the running kernel has no NFS server (module nfsd; Debian's linux-image-amd64 has it): %w", ErrUnavailable, errors.Join(modErr, err))
	}
	return nil
}

// takeOver reads what an earlier Start left behind when it was killed. What is
// still wanted goes on without a gap: a node that asks for a file in one would
// be told that it is gone (ESTALE). The rest is taken back.
func (s *Server) takeOver(ctx context.Context) error {
	text, err := os.ReadFile(s.cfg.Record)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record of the kernel's exports: %w", err)
	}
	if err := json.Unmarshal(text, &s.rec); err != nil {
		return fmt.Errorf("record of the kernel's exports, %s, is damaged: %w\n  remove it when exportfs -s shows none of this cluster's", s.cfg.Record, err)
	}
	if len(s.rec.Exports) == 0 {
		return nil
	}
	s.log.Info("taking over what an earlier run exported", "exports", s.rec.Exports)
	var wanted, stale []string
	for _, e := range s.rec.Exports {
		if slices.Contains(s.wanted(), e) {
			wanted = append(wanted, e)
		} else {
			stale = append(stale, e)
		}
	}
	if err := s.unexport(ctx, stale); err != nil {
		return err
	}
	s.rec.Exports = wanted
	return s.save()
}

// wanted are the exports that there should be, as CLIENT:DIR.
func (s *Server) wanted() []string {
	var list []string
	for _, e := range s.cfg.Exports {
		for _, client := range s.cfg.Clients {
			list = append(list, client+":"+e.Dir)
		}
	}
	return list
}

// exported are the exports that the kernel has, as exportfs -s prints them:
// directory, white space, CLIENT(OPTIONS).
func (s *Server) exported(ctx context.Context) (map[string][]string, error) {
	out, err := s.sys.Run(ctx, "exportfs", "-s")
	if err != nil {
		return nil, fmt.Errorf("what the kernel exports: %w", err)
	}
	clients := map[string][]string{}
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		for _, f := range fields[1:] {
			client, _, _ := strings.Cut(f, "(")
			clients[fields[0]] = append(clients[fields[0]], client)
		}
	}
	return clients, nil
}

// conflicts refuses to touch what the admin has set up.
func (s *Server) conflicts(ctx context.Context) error {
	exported, err := s.exported(ctx)
	if err != nil {
		return err
	}
	for _, e := range s.cfg.Exports {
		others := slices.DeleteFunc(exported[e.Dir], func(client string) bool { return slices.Contains(s.rec.Exports, client+":"+e.Dir) })
		if len(others) > 0 {
			return fmt.Errorf("%w: %s is exported to %s already, and not by krgimage. Remove it from /etc/exports, or now:\n  exportfs -u %s:%s",
				ErrConflict, e.Dir, strings.Join(others, ", "), others[0], e.Dir)
		}
	}
	if s.running() == 0 {
		return nil
	}
	if text, err := os.ReadFile(s.sys.Path(versFile)); err == nil && !slices.Contains(strings.Fields(string(text)), "+3") {
		return fmt.Errorf("%w: the kernel's NFS server runs without version 3 (%s), which nodes need. Set vers3=y in the section nfsd of /etc/nfs.conf and restart it", ErrConflict, strings.TrimSpace(string(text)))
	}
	if text, err := os.ReadFile(s.sys.Path(portsFile)); err == nil && !listens(string(text), s.cfg.Port) {
		return fmt.Errorf("%w: the kernel's NFS server doesn't listen on TCP port %d (%s). Set network.nfs_port to its port", ErrConflict, s.cfg.Port, strings.Join(strings.Fields(string(text)), " "))
	}
	return nil
}

// listens reads a portlist: lines of transport and port.
func listens(portlist string, port int) bool {
	for line := range strings.Lines(portlist) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "tcp" && f[1] == strconv.Itoa(port) {
			return true
		}
	}
	return false
}

// running is the number of nfsd's threads.
func (s *Server) running() int {
	text, err := os.ReadFile(s.sys.Path(threadsFile))
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

// startDaemons starts those that don't run: rpc.statd and rpc.mountd register
// with rpcbind, so that one comes first.
func (s *Server) startDaemons(ctx context.Context) error {
	if _, err := s.sys.Served(ctx, progPortmap, 2); err != nil {
		if err := s.daemon("rpcbind", "-f", "-w"); err != nil {
			return err
		}
		if err := s.sys.Wait(ctx, "rpcbind", func() bool { _, err := s.sys.Served(ctx, progPortmap, 2); return err == nil }); err != nil {
			return err
		}
	}
	for _, d := range []struct {
		prog, vers uint32
		argv       []string
	}{
		{progStatus, 1, []string{"rpc.statd", "-F"}},
		{progMount, 3, []string{"rpc.mountd", "-F", "-N", "4", "-u"}},
	} {
		served := func() bool { port, err := s.sys.Served(ctx, d.prog, d.vers); return err == nil && port > 0 }
		if served() {
			continue
		}
		if err := s.daemon(d.argv...); err != nil {
			return err
		}
		if err := s.sys.Wait(ctx, d.argv[0], served); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) daemon(argv ...string) error {
	d, err := s.sys.Daemon(argv...)
	if err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	s.log.Info("started", "program", argv[0])
	s.daemons = append(s.daemons, d)
	return nil
}

// options are those of an export (exports(5)). The fsid follows from the path,
// so that handles outlive everything but a new root.
func (e Export) options() string {
	mode, squash := "rw", "no_root_squash"
	if e.ReadOnly {
		mode = "ro"
	}
	if e.RootSquash {
		squash = "root_squash"
	}
	id := sha256.Sum256([]byte("krgimage fsid\x00" + e.Dir))
	return fmt.Sprintf("%s,%s,sync,no_subtree_check,sec=sys,fsid=%x-%x-%x-%x-%x", mode, squash, id[:4], id[4:6], id[6:8], id[8:10], id[10:16])
}

func (s *Server) exportsFile() string {
	return s.sys.Path(filepath.Join(exportsDir, "krgimage-"+s.cfg.Name+".exports"))
}

// export exports our directories: at once by exportfs, and by the file whenever
// somebody has exportfs read the files again.
func (s *Server) export(ctx context.Context) error {
	text := "# Written by 'krgimage serve --nfs=kernel', which removes it when it stops.\n"
	for _, e := range s.cfg.Exports {
		text += e.Dir
		for _, client := range s.cfg.Clients {
			text += fmt.Sprintf(" %s(%s)", client, e.options())
		}
		text += "\n"
	}
	s.rec.Exports = s.wanted()
	if err := s.save(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.exportsFile()), 0o755); err != nil {
		return err
	}
	if err := renameio.WriteFile(s.exportsFile(), []byte(text), 0o644); err != nil {
		return fmt.Errorf("write the exports: %w", err)
	}
	for _, e := range s.cfg.Exports {
		for _, client := range s.cfg.Clients {
			if _, err := s.sys.Run(ctx, "exportfs", "-i", "-o", e.options(), client+":"+e.Dir); err != nil {
				return fmt.Errorf("export %s to %s: %w", e.Dir, client, err)
			}
		}
	}
	return nil
}

// unexport takes back those of the list that there are.
func (s *Server) unexport(ctx context.Context, list []string) error {
	exported, err := s.exported(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range list {
		client, dir, _ := strings.Cut(e, ":")
		if !slices.Contains(exported[dir], client) {
			continue
		}
		if _, err := s.sys.Run(ctx, "exportfs", "-u", e); err != nil {
			errs = append(errs, fmt.Errorf("take back the export %s: %w", e, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Server) startThreads(ctx context.Context) error {
	if n := s.running(); n > 0 {
		s.log.Info("nfsd runs already", "threads", n, "ours", s.rec.Threads)
		return nil
	}
	s.rec.Threads = true
	if err := s.save(); err != nil {
		return err
	}
	if _, err := s.sys.Run(ctx, "rpc.nfsd", "-U", "-N", "4", "-V", "3", "-p", strconv.Itoa(s.cfg.Port), strconv.Itoa(threads)); err != nil {
		return fmt.Errorf("start nfsd on TCP port %d: %w", s.cfg.Port, err)
	}
	if s.running() == 0 {
		return fmt.Errorf("%w: rpc.nfsd started no thread; the kernel's log says why (dmesg)", ErrUnavailable)
	}
	return nil
}

// Close takes back the exports and ends what Start started. Threads of ours end
// first: nodes then wait for the server to come back, while without the export
// they would be told that their files are gone. It runs to its end whatever
// happened to contexts.
func (s *Server) Close() error {
	ctx := context.Background()
	var errs []error
	if s.rec.Threads && s.onlyOurs(ctx) {
		if _, err := s.sys.Run(ctx, "rpc.nfsd", "0"); err != nil {
			errs = append(errs, fmt.Errorf("stop nfsd: %w", err))
		} else {
			s.rec.Threads = false
		}
	}
	errs = append(errs, s.unexport(ctx, s.rec.Exports))
	if err := os.Remove(s.exportsFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, d := range slices.Backward(s.daemons) {
		errs = append(errs, d.Close())
	}
	s.daemons = nil
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(s.cfg.Record); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// onlyOurs reports whether nobody else exports anything: an admin may have added
// exports while our threads served.
func (s *Server) onlyOurs(ctx context.Context) bool {
	exported, err := s.exported(ctx)
	if err != nil {
		return false
	}
	for dir, clients := range exported {
		for _, client := range clients {
			if !slices.Contains(s.rec.Exports, client+":"+dir) {
				return false
			}
		}
	}
	return true
}

func (s *Server) save() error {
	text, err := json.Marshal(s.rec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.cfg.Record), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(s.cfg.Record, append(text, '\n'), 0o600)
}
