package container

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/retry"
	"krgimage/node/supervise"
)

// TestMain lets the test binary be the container's init and the program that
// looks around in it.
func TestMain(m *testing.M) {
	switch {
	case os.Args[0] == Name && IsInit():
		os.Exit(Main(os.Stdout))
	case filepath.Base(os.Args[0]) == "probe":
		probe(os.Args[1:])
	default:
		os.Exit(m.Run())
	}
}

// facts is what the probe sees in the container.
type facts struct {
	PID, Parent int
	Hostname    string
	Env         []string
	Umask       int
	Files       []string // descriptors above 2 and what they are
	Mounts      map[string]string
	Root        []string // names in /
	Dev         []string
	Shared      string // /run/krg/hello
	Null        string // error writing /dev/null
	Terminal    string // error opening a new terminal
	SysWrites   bool
	Ignored     string // SigIgn of /proc/self/status
	Zombies     int
}

func probe(args []string) {
	switch {
	case len(args) > 0 && args[0] == "fork": // leaves an orphan behind
		_ = exec.Command("/bin/probe", "exit").Start()
		return
	case len(args) > 0 && args[0] == "exit":
		return
	case len(args) > 0 && args[0] == "stubborn":
		_ = exec.Command("/bin/probe", "deaf").Start()
		fmt.Println("{}")
		forever()
	case len(args) > 0 && args[0] == "deaf":
		signal.Ignore(unix.SIGTERM)
		forever()
	}
	_ = exec.Command("/bin/probe", "fork").Run()
	f := facts{PID: os.Getpid(), Parent: os.Getppid(), Env: os.Environ(), Mounts: map[string]string{}}
	f.Hostname, _ = os.Hostname()
	f.Umask = unix.Umask(0)
	f.Root, f.Dev = names("/"), names("/dev")
	for _, fd := range names("/proc/1/fd") {
		to, _ := os.Readlink("/proc/1/fd/" + fd)
		f.Files = append(f.Files, to)
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		w := strings.Fields(line)
		f.Mounts[w[1]] = w[2] + " " + w[3]
	}
	hello, _ := os.ReadFile("/run/krg/hello")
	f.Shared = string(hello)
	f.Null = fmt.Sprint(os.WriteFile("/dev/null", []byte("x"), 0))
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	f.Terminal = fmt.Sprint(err)
	tty.Close()
	f.SysWrites = os.WriteFile("/sys/kernel/mm/transparent_hugepage/enabled", []byte("madvise"), 0) == nil
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			f.Ignored = strings.TrimSpace(v)
		}
	}
	// The orphan may need a moment to be reaped.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if f.Zombies = zombies(); f.Zombies == 0 {
			break
		}
	}
	text, _ := json.Marshal(f)
	fmt.Println(string(text))
	forever()
}

// forever isn't select {}, which the runtime takes for a deadlock.
func forever() { time.Sleep(24 * time.Hour) }

func names(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func zombies() (n int) {
	for _, pid := range names("/proc") {
		text, _ := os.ReadFile("/proc/" + pid + "/stat")
		if _, rest, ok := bytes.Cut(text, []byte(") ")); ok && bytes.HasPrefix(rest, []byte("Z")) {
			n++
		}
	}
	return n
}

// start runs a container whose one service is the probe with args, over a root
// in memory, and returns the probe's first line.
func start(t *testing.T, args ...string) (line string, u *supervise.Unit, stop func() error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making namespaces and mounts needs root")
	}
	if out, err := exec.Command("unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "true").CombinedOutput(); err != nil {
		t.Skipf("no namespaces here: %v %s", err, out)
	}
	root, shared := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
		t.Skipf("no mounts here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "etc", "bin"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string][]byte{
		filepath.Join(root, "bin/probe"): self, filepath.Join(root, "etc/hostname"): []byte("shared\n"), filepath.Join(shared, "hello"): []byte("from the host"),
	} {
		if err := os.WriteFile(path, text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := Config{
		Root: root, Hostname: "krg-3", Domain: "krg", Shared: shared, Grace: 200 * time.Millisecond,
		Services: []Service{{Name: "probe", Argv: append([]string{"/bin/probe"}, args...)}},
	}
	r, w := io.Pipe()
	u = supervise.New(supervise.Service{
		Name: "container", StopTimeout: time.Minute, Tee: w,
		Command: func() (*exec.Cmd, error) { return Command("/proc/self/exe", c, nil) },
	}, supervise.NewReaper(false), retry.System{}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- u.Run(ctx) }()
	said := make(chan string, 1)
	go func() {
		in := bufio.NewReaderSize(r, 1<<20)
		for {
			l, err := in.ReadString('\n')
			if err != nil {
				return
			}
			select {
			case said <- l:
			default:
			}
		}
	}()
	stop = func() error { cancel(); defer w.Close(); return <-done }
	line = <-said
	text, ok := strings.CutPrefix(line, "probe: ")
	if !ok {
		_ = stop()
		t.Fatalf("the container says %s", line)
	}
	return text, u, stop
}

func TestContainer(t *testing.T) {
	line, u, stop := start(t)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if s := u.Status(); s.LastExit != "exit status 0" || s.Starts != 1 {
		t.Errorf("container's status %+v", s)
	}
	var f facts
	if err := json.Unmarshal([]byte(line), &f); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	if f.Parent != 1 || f.PID > 100 {
		t.Errorf("pid %d, parent %d: not in a PID namespace of its own under its init", f.PID, f.Parent)
	}
	if f.Hostname != "krg-3" || f.Umask != 0o022 || f.Shared != "from the host" || f.Zombies != 0 || f.SysWrites {
		t.Errorf("host name %q, umask %o, shared %q, %d zombies, writable /sys %v", f.Hostname, f.Umask, f.Shared, f.Zombies, f.SysWrites)
	}
	if f.Null != "<nil>" || f.Terminal != "<nil>" {
		t.Errorf("/dev/null: %s, /dev/ptmx: %s", f.Null, f.Terminal)
	}
	if f.Ignored != "0000000000000000" {
		t.Errorf("ignored signals %s", f.Ignored)
	}
	if !slices.Equal(f.Env, environment) {
		t.Errorf("environment %q", f.Env)
	}
	if want := []string{"bin", "dev", "etc", "proc", "run", "sys", "tmp"}; !slices.Equal(f.Root, want) {
		t.Errorf("/ has %q, want %q", f.Root, want)
	}
	for _, d := range []string{"console", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"} {
		if !slices.Contains(f.Dev, d) {
			t.Errorf("/dev lacks %s: %q", d, f.Dev)
		}
	}
	for dir, want := range map[string]string{"/proc": "proc rw", "/sys": "sysfs ro", "/dev": "tmpfs rw", "/dev/pts": "devpts rw", "/dev/shm": "tmpfs rw", "/run": "tmpfs rw"} {
		if !strings.HasPrefix(f.Mounts[dir], want) {
			t.Errorf("%s is %q, want %s", dir, f.Mounts[dir], want)
		}
	}
	allowed := []string{"/", "/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/run", "/run/krg"}
	for dir := range f.Mounts {
		if !slices.Contains(allowed, dir) {
			t.Errorf("the host's mount %s shows in the container", dir)
		}
	}
	for _, file := range f.Files {
		// The Go runtime keeps its control group's CPU limit open.
		if strings.HasPrefix(file, "/") && file != "/dev/null" && !strings.HasPrefix(file, "/cpu.") {
			t.Errorf("the init holds the host's file %s", file)
		}
	}
}

// TestStopKillsTheDeaf has a process that no signal but SIGKILL reaches.
func TestStopKillsTheDeaf(t *testing.T) {
	_, u, stop := start(t, "stubborn")
	if err := stop(); err != nil {
		t.Error(err)
	}
	if s := u.Status(); s.State != supervise.Stopped || s.LastExit != "exit status 0" {
		t.Errorf("container's status %+v", s)
	}
}

func TestPrefixed(t *testing.T) {
	var out bytes.Buffer
	p := &prefixed{mu: &sync.Mutex{}, w: &out, prefix: "sshd: "}
	for _, s := range []string{"one\ntw", "o\n", "", "three"} {
		if n, err := p.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatal(n, err)
		}
	}
	if got, want := out.String(), "sshd: one\nsshd: two\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestIsInit(t *testing.T) {
	if IsInit() {
		t.Error("a test takes itself for an init")
	}
}
