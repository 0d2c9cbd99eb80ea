package trial

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"time"
)

// BareBoot is a kernel booted directly by QEMU, without firmware network boot
// and without a root: the time below which no boot over the network can come.
type BareBoot struct {
	QEMU   string // qemu-system-x86_64
	Accel  Accel
	Memory int64 // bytes
	CPUs   int
	Kernel string // path of vmlinuz
	Initrd string // path of an initramfs whose init prints the marker
	Append string // kernel command line; console=ttyS0 is added
	Marker string // text on the serial line that ends the measurement
}

// MeasureBareBoot returns the time from QEMU's start to the marker.
func MeasureBareBoot(ctx context.Context, b BareBoot) (time.Duration, error) {
	took, err := b.measure(ctx, io.Discard)
	if err != nil {
		return 0, fmt.Errorf("bare boot of %s: %w", b.Kernel, err)
	}
	return took, nil
}

// measure copies the console to out.
func (b BareBoot) measure(ctx context.Context, out io.Writer) (time.Duration, error) {
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-no-reboot"}
	args = append(args, b.Accel.Args...)
	args = append(args, "-m", strconv.FormatInt(b.Memory>>20, 10), "-smp", strconv.Itoa(b.CPUs),
		"-kernel", b.Kernel, "-initrd", b.Initrd, "-append", "console=ttyS0,115200 "+b.Append, "-serial", "stdio")
	cmd := exec.Command(b.QEMU, args...)
	var stderr, serial tail
	cmd.Stderr = &stderr
	found := newMatcher(b.Marker)
	hit := make(chan time.Duration, 1)
	start := time.Now()
	cmd.Stdout = writerFunc(func(p []byte) (int, error) {
		serial.Write(p)
		out.Write(p)
		if hit != nil && found.find(p) {
			hit <- time.Since(start)
			hit = nil
		}
		return len(p), nil
	})
	result := hit
	p, err := startChild(cmd)
	if err != nil {
		return 0, err
	}
	defer func() {
		p.kill()
		<-p.done
	}()
	select {
	case took := <-result:
		return took, nil
	case <-p.done:
		select {
		case took := <-result: // printed just before the end
			return took, nil
		default:
		}
		return 0, fmt.Errorf("%s before %q was printed%s", exitText(p.err), b.Marker, stderr.hint())
	case <-ctx.Done():
		return 0, fmt.Errorf("%q was not printed: %w; the console ended with: %s", b.Marker, ctx.Err(), serial.last(300))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

var _ io.Writer = writerFunc(nil)
