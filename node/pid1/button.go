package pid1

import (
	"context"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"krgimage/node/bootlog"
	"krgimage/node/coldplug"
)

// Fields of struct input_event on 64-bit machines (linux/input.h): two 8-byte
// words of time, type, code, value.
const (
	inputEventSize = 24
	evKey          = 1
	keyPower       = 116
	keyRestart     = 0x198
	pressed        = 1
)

// powerButton watches the input devices for a press of the power button: ACPI
// presents it as a small keyboard, through the modules button and evdev.
func (m *machine) powerButton(ctx context.Context) error {
	listener, err := coldplug.Listen()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	open := map[string]bool{} // guarded by mu
	watch := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if open[name] {
			return
		}
		f, err := os.Open(name)
		if err != nil {
			return
		}
		open[name] = true
		go func() { // ends when the device goes away
			defer f.Close()
			stage := readButton(f)
			mu.Lock()
			delete(open, name)
			mu.Unlock()
			if stage != "" {
				m.wish(stage, "power button")
			}
		}()
	}
	// Listening first and looking afterwards misses none.
	names, _ := filepath.Glob("/dev/input/event*")
	for _, n := range names {
		watch(n)
	}
	return listener.Run(ctx, func(e coldplug.Event) {
		if e.Action == "" {
			names, _ := filepath.Glob("/dev/input/event*")
			for _, n := range names {
				watch(n)
			}
		}
		if e.Action == "add" && strings.HasPrefix(e.Env["DEVNAME"], "input/event") {
			watch(filepath.Join("/dev", e.Env["DEVNAME"]))
		}
	})
}

// readButton reads input events until a button that takes the node down is
// pressed or the device goes away.
func readButton(r io.Reader) (stage string) {
	buf := make([]byte, inputEventSize)
	for {
		if _, err := io.ReadFull(r, buf); err != nil {
			return ""
		}
		kind, code := binary.NativeEndian.Uint16(buf[16:]), binary.NativeEndian.Uint16(buf[18:])
		value := binary.NativeEndian.Uint32(buf[20:])
		if kind != evKey || value != pressed {
			continue
		}
		switch code {
		case keyPower:
			return bootlog.StagePoweroff
		case keyRestart:
			return bootlog.StageReboot
		}
	}
}
