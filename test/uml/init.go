package uml

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nsm"
	"krgimage/node/statd"
)

// Jobs that init does itself.
const (
	jobMount   = "uml-mount"
	jobUnmount = "uml-unmount"
	jobLocks   = "uml-locks"
)

// initMain is the guest's init. It ends when the machine kills the guest.
func initMain() int {
	fmt.Fprintf(os.Stderr, "init: %v\n", guestInit())
	// The kernel has panic=-1: an init that ends is the end of its process.
	return 1
}

func guestInit() error {
	for _, m := range []struct{ fstype, dir, data string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""},
		{"tmpfs", "/run", "mode=0755"}, {"tmpfs", "/mnt", "mode=0755"}, {"tmpfs", "/tmp", "mode=1777"}, {"tmpfs", "/var/tmp", "mode=1777"},
	} {
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		_ = os.Symlink(target, filepath.Join("/dev", name))
	}
	for _, dir := range []string{"/dev/pts", "/dev/shm"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"); err != nil {
		return err
	}
	if err := unix.Mount("devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(os.Getenv("KRG_UML_NAME"))); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	addr, err := netip.ParseAddr(os.Getenv(initVariable))
	if err != nil {
		return err
	}
	if err := network(addr); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	head, err := netip.ParseAddr(os.Getenv("KRG_UML_HEAD"))
	if err != nil {
		return err
	}
	// As PID 1 of a node does.
	sockets, err := statd.Listen()
	if err != nil {
		return err
	}
	monitor := statd.New(statd.Config{
		Name: os.Getenv("KRG_UML_NAME"), Server: head, State: nsm.StateAt(time.Now()),
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	go monitor.Serve(context.Background(), sockets)
	l, err := net.Listen("tcp4", netip.AddrPortFrom(addr, agentPort).String())
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go serveJob(c, monitor)
	}
}

// nfsModules is what mounting NFS version 3 takes, in order of dependency.
// Kernels differ in which of them they have.
var nfsModules = []string{"netfs", "fscache", "sunrpc", "grace", "lockd", "nfs_acl", "nfs", "nfsv3"}

func loadModules() error {
	var release unix.Utsname
	if err := unix.Uname(&release); err != nil {
		return err
	}
	dir := filepath.Join("/usr/lib/uml/modules", unix.ByteSliceToString(release.Release[:]), "kernel")
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, _, isModule := strings.Cut(d.Name(), ".ko")
		if isModule {
			files[name] = path
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("modules: %w", err)
	}
	for _, name := range nfsModules {
		file := files[name]
		if file == "" {
			continue
		}
		if err := loadModule(file); err != nil {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

func loadModule(file string) error {
	if !strings.HasSuffix(file, ".ko") {
		out, err := exec.Command("/sbin/insmod", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func network(addr netip.Addr) error {
	for name, ip := range map[string]netip.Addr{"lo": netip.MustParseAddr("127.0.0.1"), "vec0": addr} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		a := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(prefixLen, 32)}}
		if err := netlink.AddrReplace(link, a); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// serveJob does one job and says how it went.
func serveJob(c net.Conn, monitor *statd.Monitor) {
	defer c.Close()
	var job Job
	if err := json.NewDecoder(c).Decode(&job); err != nil {
		return
	}
	enc := json.NewEncoder(c)
	if job.Args[0] == jobLocks {
		if err := monitor.Announce(context.Background()); err != nil {
			_ = enc.Encode(answer{Error: err.Error()})
			return
		}
		_ = enc.Encode(answer{Exit: &ExitError{}})
		return
	}
	exit, err := doJob(job, func(p []byte) error { return enc.Encode(answer{Output: p}) }, c)
	if err != nil {
		_ = enc.Encode(answer{Error: err.Error()})
		return
	}
	_ = enc.Encode(answer{Exit: exit})
}

func doJob(job Job, out func([]byte) error, alive io.Reader) (*ExitError, error) {
	switch job.Args[0] {
	case jobMount:
		if err := os.MkdirAll(job.Args[2], 0o755); err != nil {
			return nil, err
		}
		if err := unix.Mount(job.Args[1], job.Args[2], "nfs", 0, job.Args[3]); err != nil {
			return nil, fmt.Errorf("mount %s (%s): %w", job.Args[1], job.Args[3], err)
		}
		return &ExitError{}, nil
	case jobUnmount:
		return &ExitError{}, unix.Unmount(job.Args[1], 0)
	}
	cmd := exec.Command(job.Args[0], job.Args[1:]...)
	if strings.HasPrefix(job.Args[0], rolePrograms) {
		// The link leads to the binary even where a mount hides its path.
		cmd = &exec.Cmd{Path: "/proc/self/exe", Args: job.Args}
	}
	cmd.Dir = job.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LC_ALL=C.UTF-8"}, job.Env...)
	if job.Stdin != "" {
		cmd.Stdin = strings.NewReader(job.Stdin)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, Chroot: job.Root,
		Credential: &syscall.Credential{Uid: job.UID, Gid: job.GID, Groups: job.Groups},
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	go func() {
		// Whoever asked for the job has gone away: nobody wants the rest.
		_, _ = io.Copy(io.Discard, alive)
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if out(buf[:n]) != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		return nil, err
	}
	return &ExitError{Status: cmd.ProcessState.String(), Code: cmd.ProcessState.ExitCode()}, nil
}
