// A plugin of qemu, API 4 (qemu 10.0). At each close(-12345) of the guest it prints the instructions since the last one.
// The declarations are those of include/qemu/qemu-plugin.h, so that it compiles without the sources.
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t id;
typedef struct { void *score; size_t offset; } u64;
struct tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(id, void (*)(id, struct tb *));
extern size_t qemu_plugin_tb_n_insns(const struct tb *);
extern void *qemu_plugin_scoreboard_new(size_t);
extern uint64_t qemu_plugin_u64_sum(u64);
extern void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct tb *, int, u64, uint64_t);
extern void qemu_plugin_register_vcpu_syscall_cb(
    id, void (*)(id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
EXPORT int qemu_plugin_version = 4;

static u64 count;
static uint64_t last;

static void translated(id i, struct tb *tb) {
    qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, 0, count, qemu_plugin_tb_n_insns(tb));
}

static void called(id i, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f,
                   uint64_t g, uint64_t h) {
    if (number == 57 && (int32_t)a == -12345) {
        uint64_t now = qemu_plugin_u64_sum(count);
        fprintf(stderr, "instructions %" PRIu64 "\n", now - last);
        last = now;
    }
}

EXPORT int qemu_plugin_install(id i, const void *info, int argc, char **argv) {
    count.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
    qemu_plugin_register_vcpu_tb_trans_cb(i, translated);
    qemu_plugin_register_vcpu_syscall_cb(i, called);
    return 0;
}
