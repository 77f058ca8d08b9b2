import EdgeLlamaCore
import SwiftUI

struct BenchmarkView: View {
    @State private var screen: BenchmarkScreen

    init(screen: BenchmarkScreen) {
        _screen = State(initialValue: screen)
    }

    var body: some View {
        List {
            Section("Plan") {
                Stepper("Prompt: \(screen.plan.promptTokens) tokens", value: $screen.plan.promptTokens, in: 8...1024, step: 8)
                Stepper("Decode: \(screen.plan.decodeTokens) tokens", value: $screen.plan.decodeTokens, in: 8...512, step: 8)
                Stepper("Warm-up runs: \(screen.plan.warmUps)", value: $screen.plan.warmUps, in: 0...5)
                Stepper("Runs: \(screen.plan.runs)", value: $screen.plan.runs, in: 1...20)
            }
            .disabled(screen.isBusy)
            if let error: String = screen.error { ErrorText(error) }
            if screen.isBusy {
                ProgressView(value: Double(screen.done), total: Double(screen.allRuns))
                    .accessibilityLabel("Benchmark")
                    .accessibilityValue("\(screen.done) of \(screen.allRuns) runs")
            }
            LinesText(screen.lines)
        }
        .navigationTitle("Benchmark")
        .toolbar {
            if let file: URL = screen.file { ShareLink("Share the result", item: file) }
            RunButton(isBusy: screen.isBusy, start: { screen.start() }, stop: { screen.stop() })
        }
        .onDisappear { screen.stop() }
    }
}
