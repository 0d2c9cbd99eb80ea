package knfsd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// machine is a System with a kernel and tools made of maps.
type machine struct {
	t       *testing.T
	dir     string
	missing string            // a tool that isn't installed
	module  bool              // the kernel has nfsd
	exports map[string]string // CLIENT:DIR to options
	served  map[uint32]int
	daemons []string // that run
	log     []string
	failing string // a command that fails
}

func newMachine(t *testing.T) *machine {
	return &machine{t: t, dir: t.TempDir(), module: true, exports: map[string]string{}, served: map[uint32]int{}}
}

func (m *machine) Find(program string) bool { return program != m.missing }
func (m *machine) Path(file string) string  { return filepath.Join(m.dir, file) }

func (m *machine) write(file, text string) {
	m.t.Helper()
	at := m.Path(file)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// nfsd has threads run, as an admin's nfs-server would.
func (m *machine) nfsd(threads, versions, ports string) {
	m.write(threadsFile, threads+"\n")
	m.write(versFile, versions+"\n")
	m.write(portsFile, ports)
}

func (m *machine) Run(_ context.Context, argv ...string) (string, error) {
	line := strings.Join(argv, " ")
	m.log = append(m.log, line)
	if m.failing != "" && strings.HasPrefix(line, m.failing) {
		return "", errors.New("refused by the test")
	}
	switch {
	case argv[0] == "modprobe":
		if !m.module {
			return "", errors.New("module nfsd not found")
		}
	case argv[0] == "mount":
		if !m.module {
			return "", errors.New("unknown filesystem type 'nfsd'")
		}
		m.write(threadsFile, "0\n")
	case line == "exportfs -s":
		var out strings.Builder
		for e, options := range m.exports {
			client, dir, _ := strings.Cut(e, ":")
			fmt.Fprintf(&out, "%s  %s(%s)\n", dir, client, options)
		}
		return out.String(), nil
	case argv[0] == "exportfs" && argv[1] == "-i":
		m.exports[argv[4]] = argv[3]
	case argv[0] == "exportfs" && argv[1] == "-u":
		if _, ok := m.exports[argv[2]]; !ok {
			return "", errors.New("could not find " + argv[2])
		}
		delete(m.exports, argv[2])
	case argv[0] == "rpc.nfsd":
		m.nfsd(argv[len(argv)-1], "-2 +3 -4", "tcp 2049\n")
	default:
		return "", errors.New("unexpected command " + line)
	}
	return "", nil
}

func (m *machine) Daemon(argv ...string) (io.Closer, error) {
	prog := map[string]uint32{"rpcbind": progPortmap, "rpc.statd": progStatus, "rpc.mountd": progMount}[argv[0]]
	if argv[0] != "rpcbind" && m.served[progPortmap] == 0 {
		return nil, errors.New(argv[0] + " before rpcbind")
	}
	m.served[prog] = 1000 + len(m.served)
	m.daemons = append(m.daemons, argv[0])
	return closer(func() {
		delete(m.served, prog)
		m.daemons = slices.DeleteFunc(m.daemons, func(d string) bool { return d == argv[0] })
	}), nil
}

type closer func()

func (c closer) Close() error { c(); return nil }

func (m *machine) Served(_ context.Context, prog, _ uint32) (int, error) {
	if m.served[progPortmap] == 0 {
		return 0, errors.New("connection refused")
	}
	return m.served[prog], nil
}

func (m *machine) Wait(_ context.Context, what string, ready func() bool) error {
	if !ready() {
		return errors.New(what + " doesn't come up")
	}
	return nil
}

func (m *machine) config() Config {
	return Config{
		Name: "krg", Exports: []Export{{Dir: "/srv/state/root/1-abc"}, {Dir: "/srv/data", ReadOnly: true, RootSquash: true}},
		Clients: []string{"10.77.0.0/24"}, Port: 2049, Record: filepath.Join(m.dir, "state/knfsd.json"), System: m,
	}
}

const ownFile = exportsDir + "/krgimage-krg.exports"

func (m *machine) exists(file string) bool {
	_, err := os.Stat(m.Path(file))
	return err == nil
}

func TestStartAndClose(t *testing.T) {
	m := newMachine(t)
	s, err := Start(context.Background(), m.config())
	if err != nil {
		t.Fatal(err)
	}
	root := m.exports["10.77.0.0/24:/srv/state/root/1-abc"]
	if !strings.HasPrefix(root, "rw,no_root_squash,sync,no_subtree_check,sec=sys,fsid=") || len(root) != len("rw,no_root_squash,sync,no_subtree_check,sec=sys,fsid=")+36 {
		t.Errorf("options of the root: %q", root)
	}
	data := m.exports["10.77.0.0/24:/srv/data"]
	if !strings.HasPrefix(data, "ro,root_squash,") || data[len(data)-36:] == root[len(root)-36:] {
		t.Errorf("options of the data: %q", data)
	}
	if want := []string{"rpcbind", "rpc.statd", "rpc.mountd"}; !slices.Equal(m.daemons, want) {
		t.Errorf("daemons %v, want %v", m.daemons, want)
	}
	if last := m.log[len(m.log)-1]; last != "rpc.nfsd -U -N 4 -V 3 -p 2049 64" {
		t.Errorf("the last command is %q: nothing may be asked for before it is exported", last)
	}
	text, err := os.ReadFile(m.Path(ownFile))
	if err != nil || !strings.Contains(string(text), "\n/srv/state/root/1-abc 10.77.0.0/24("+root+")\n") {
		t.Errorf("file of exports: %q, %v", text, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(m.exports) > 0 || len(m.daemons) > 0 || m.exists(ownFile) || m.exists("state/knfsd.json") || s.running() != 0 {
		t.Errorf("left behind: exports %v, daemons %v, %d threads", m.exports, m.daemons, s.running())
	}
	if stop, first := slices.Index(m.log, "rpc.nfsd 0"), slices.Index(m.log, "exportfs -u 10.77.0.0/24:/srv/state/root/1-abc"); stop < 0 || stop > first {
		t.Errorf("the export went before the threads: nodes get ESTALE\n%s", strings.Join(m.log, "\n"))
	}
}

// TestBesideTheAdmins starts on a machine whose admin has an NFS server.
func TestBesideTheAdmins(t *testing.T) {
	m := newMachine(t)
	m.nfsd("8", "+3 +4 +4.1 +4.2", "tcp-nosync 2049\nudp 2049\ntcp 2049\n")
	m.served = map[uint32]int{progPortmap: 111, progStatus: 3000, progMount: 3001}
	m.exports["*:/srv/mirror"] = "ro"
	s, err := Start(context.Background(), m.config())
	if err != nil {
		t.Fatal(err)
	}
	if len(m.daemons) > 0 {
		t.Errorf("started %v beside the admin's", m.daemons)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(m.exports) != 1 || s.running() != 8 || m.served[progMount] == 0 {
		t.Errorf("the admin's server: exports %v, %d threads", m.exports, s.running())
	}
	for _, line := range m.log {
		if strings.HasPrefix(line, "rpc.nfsd") || strings.HasPrefix(line, "exportfs") && strings.Contains(line, "mirror") {
			t.Errorf("touched by %q", line)
		}
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(*machine, *Config)
		want error
		text string
	}{
		"not installed": {func(m *machine, _ *Config) { m.missing = "rpc.mountd" }, ErrUnavailable, "apt-get install nfs-kernel-server"},
		"no module":     {func(m *machine, _ *Config) { m.module = false }, ErrUnavailable, "module nfsd"},
		"exported":      {func(m *machine, _ *Config) { m.exports["*:/srv/data"] = "rw" }, ErrConflict, "exportfs -u *:/srv/data"},
		"no version 3":  {func(m *machine, _ *Config) { m.nfsd("8", "-3 +4", "tcp 2049\n") }, ErrConflict, "vers3=y"},
		"another port":  {func(m *machine, _ *Config) { m.nfsd("8", "+3", "tcp 2050\n") }, ErrConflict, "network.nfs_port"},
		"odd path":      {func(_ *machine, c *Config) { c.Exports[0].Dir = "/srv/my state" }, nil, "needs quotes"},
		"export fails":  {func(m *machine, _ *Config) { m.failing = "exportfs -i" }, nil, "refused by the test"},
		"nfsd fails":    {func(m *machine, _ *Config) { m.failing = "rpc.nfsd -U" }, nil, "TCP port 2049"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			cfg := m.config()
			c.set(m, &cfg)
			before := len(m.exports)
			_, err := Start(context.Background(), cfg)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error = %v, want %v with %q", err, c.want, c.text)
			}
			if len(m.exports) != before || len(m.daemons) > 0 || m.exists(ownFile) {
				t.Errorf("left behind: exports %v, daemons %v", m.exports, m.daemons)
			}
		})
	}
}

// TestAfterACrash starts where an earlier run was killed: its exports that are
// still wanted never go away, the others do.
func TestAfterACrash(t *testing.T) {
	m := newMachine(t)
	old := m.config()
	old.Exports = append(old.Exports, Export{Dir: "/srv/gone"})
	if _, err := Start(context.Background(), old); err != nil {
		t.Fatal(err)
	}
	// The kernel's state outlives the process, its daemons don't.
	m.served, m.daemons, m.log = map[uint32]int{}, nil, nil
	s, err := Start(context.Background(), m.config())
	if err != nil {
		t.Fatal(err)
	}
	if len(m.exports) != 2 || slices.ContainsFunc(m.log, func(l string) bool { return strings.HasPrefix(l, "exportfs -u") && !strings.HasSuffix(l, "/srv/gone") }) {
		t.Errorf("exports %v after\n%s", m.exports, strings.Join(m.log, "\n"))
	}
	if len(m.daemons) != 3 {
		t.Errorf("daemons %v", m.daemons)
	}
	if err := s.Close(); err != nil || len(m.exports) > 0 || s.running() > 0 {
		t.Errorf("Close: %v, exports %v, %d threads", err, m.exports, s.running())
	}
}

// TestAdminsExportBesideOurThreads keeps the threads that we started when
// somebody else relies on them by now.
func TestAdminsExportBesideOurThreads(t *testing.T) {
	m := newMachine(t)
	s, err := Start(context.Background(), m.config())
	if err != nil {
		t.Fatal(err)
	}
	m.exports["*:/srv/mirror"] = "ro"
	if err := s.Close(); err != nil || s.running() == 0 || len(m.exports) != 1 {
		t.Errorf("Close: %v, %d threads, exports %v", err, s.running(), m.exports)
	}
}
